"""Simulated one-minute bars with CTX V3 structure flags.

Input: a numpy Generator, a number of bars and a `Symbol`. Output: `Bars`, a dict of arrays of equal length, one entry
per bar, with the field names of a CTX export. Prices are whole ticks.

Sources:
- volatility clustering: GARCH(1, 1), Bollerslev (1986), scaled to a long-run variance of one;
- high and low given open and close: extremes of a Brownian bridge, Glasserman (2003), section 6.4.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ctxtrain.bars.structure import Bars, Bools, Floats, Ints, add_structure
from ctxtrain.labels import SIMULATED_SUFFIX

SESSION_BARS = 23 * 60  # futures trade from 22:00 to 21:00 UTC, then pause for an hour
WEEK_SESSIONS = 5
WEEK_BARS = SESSION_BARS * WEEK_SESSIONS
FIRST_SESSION = np.datetime64("2023-01-01T22:00", "m")  # a Sunday
DAY_MINUTES = 24 * 60

GARCH_SHOCK, GARCH_MEMORY = 0.08, 0.90
TAIL_DEGREES = 5  # of freedom of the Student t distribution of the shocks
BREAK_MINUTES = 60  # of trading that give as much volatility as a session break


@dataclass(frozen=True)
class Symbol:
    """Parameters of one simulated market."""

    name: str
    price: float  # at the start of the simulation
    tick: float  # smallest price step
    volatility: float  # standard deviation of a one-minute log return
    volume: float  # contracts in an average minute


SYMBOLS = (
    Symbol(f"ES{SIMULATED_SUFFIX}", price=5000.0, tick=0.25, volatility=2.2e-4, volume=900.0),
    Symbol(f"NQ{SIMULATED_SUFFIX}", price=17500.0, tick=0.25, volatility=3.0e-4, volume=450.0),
    Symbol(f"GC{SIMULATED_SUFFIX}", price=2000.0, tick=0.1, volatility=2.5e-4, volume=160.0),
    Symbol(f"CL{SIMULATED_SUFFIX}", price=75.0, tick=0.01, volatility=4.5e-4, volume=240.0),
)


@dataclass(frozen=True)
class Regime:
    """A period of constant behaviour. Drift and pull are per bar; drift is in standard deviations."""

    drift: float
    pull: float  # share of the distance from the first price of the period that is reversed
    volatility: float
    mean_bars: int


REGIMES = (
    Regime(drift=0.22, pull=0.0, volatility=1.0, mean_bars=45),  # trend
    Regime(drift=0.0, pull=0.12, volatility=0.8, mean_bars=60),  # range
    Regime(drift=0.10, pull=0.0, volatility=1.8, mean_bars=25),  # volatile
)


def simulate(
    rng: np.random.Generator,
    bars: int,
    symbol: Symbol,
    *,
    first_bar: int = 0,
    last_close: float | None = None,
) -> Bars:
    """All fields of `bars` bars of `symbol`, starting at `bar_index` first_bar.

    Pass the last close of an earlier call to continue from its price; regime and flags start anew.
    """
    if bars < 1:
        raise ValueError(f"bars must be at least 1, got {bars}.")
    index = np.arange(first_bar, first_bar + bars, dtype=np.int64)
    activity = _session_activity(index)
    opens, closes, spread, shocks = _price_path(rng, index, activity, symbol, last_close or symbol.price)

    open_ticks = np.rint(opens / symbol.tick)
    move = np.rint(closes / symbol.tick) - open_ticks
    # The extremes are on or beyond open and close, which are whole ticks, so rounding keeps low ≤ open, close ≤ high.
    variance = (spread * opens / symbol.tick) ** 2
    rise = (move + np.sqrt(move**2 - 2 * variance * np.log1p(-rng.random(bars)))) / 2
    fall = (move - np.sqrt(move**2 - 2 * variance * np.log1p(-rng.random(bars)))) / 2

    def price(ticks: Floats) -> Floats:
        return np.round(ticks * symbol.tick, 10)  # removes binary rounding errors

    noise = np.exp(0.35 * rng.standard_normal(bars))
    volume = np.maximum(1, np.rint(symbol.volume * activity * (0.4 + 0.6 * np.abs(shocks)) * noise))
    buy_share = 0.5 + 0.3 * np.tanh(0.8 * shocks) + 0.06 * rng.standard_normal(bars)
    buys = np.rint(volume * np.clip(buy_share, 0.05, 0.95)).astype(np.int64)
    sells = volume.astype(np.int64) - buys
    return add_structure(
        {
            "bar_index": index,
            "time": _bar_times(index),
            "open": price(open_ticks),
            "high": price(open_ticks + np.rint(rise)),
            "low": price(open_ticks + np.rint(fall)),
            "close": price(open_ticks + move),
            "volume": buys + sells,
            "delta": buys - sells,
            "buy_vol": buys,
            "sell_vol": sells,
        }
    )


def _bar_times(index: Ints) -> NDArray[np.datetime64]:
    """Opening time of each bar: five sessions per week, one-minute steps within each."""
    session, minute = np.divmod(index, SESSION_BARS)
    week, day = np.divmod(session, WEEK_SESSIONS)
    minutes = (week * 7 + day) * DAY_MINUTES + minute
    return FIRST_SESSION + minutes.astype("timedelta64[m]")


def _session_activity(index: Ints) -> Floats:
    """Relative activity by minute of the session: quiet nights, the London open, the busier New York open."""
    minute = index % SESSION_BARS

    def bump(centre: int, width: float) -> Floats:
        return np.exp(-0.5 * ((minute - centre) / width) ** 2)

    return 0.5 + 0.5 * bump(10 * 60, 90.0) + 1.2 * bump(16 * 60, 80.0) + 0.5 * bump(22 * 60, 30.0)


def _price_path(
    rng: np.random.Generator, index: Ints, activity: Floats, symbol: Symbol, start: float
) -> tuple[Floats, Floats, Floats, Floats]:
    """Opens, closes, standard deviation of the return of each bar, and its shock in typical standard deviations."""
    bars = len(index)
    drift, pull, volatility, starts = _regime_path(rng, bars)
    tail = rng.standard_t(TAIL_DEGREES, bars) * np.sqrt((TAIL_DEGREES - 2) / TAIL_DEGREES)
    usual = symbol.volatility * volatility * np.sqrt(activity)
    session_open = index % SESSION_BARS == 0
    gap_size = np.where(session_open, symbol.volatility * np.sqrt(BREAK_MINUTES), 0.2 * symbol.tick / start)
    gaps = gap_size * rng.standard_normal(bars)

    opens, closes, clusters = np.empty(bars), np.empty(bars), np.empty(bars)
    level = anchor = math.log(start)
    variance = 1.0
    arrays = (tail, usual, drift, pull, starts, gaps)
    columns = zip(*(array.tolist() for array in arrays), strict=True)
    for t, (z, deviation, trend, pull_back, new_regime, gap) in enumerate(columns):
        level += gap
        if new_regime:
            anchor = level
        opens[t] = level
        clusters[t] = cluster = variance**0.5
        shock = cluster * z
        level += deviation * (trend + shock) + pull_back * (anchor - level)
        closes[t] = level
        variance = 1.0 - GARCH_SHOCK - GARCH_MEMORY + GARCH_SHOCK * shock * shock + GARCH_MEMORY * variance
    return np.exp(opens), np.exp(closes), usual * clusters, clusters * tail + drift


def _regime_path(rng: np.random.Generator, bars: int) -> tuple[Floats, Floats, Floats, Bools]:
    """Drift, pull and volatility of the regime at each bar, and the bars at which a new regime starts."""
    drift, pull, volatility = np.empty(bars), np.empty(bars), np.empty(bars)
    starts = np.zeros(bars, dtype=np.bool_)
    first = 0
    while first < bars:
        regime = REGIMES[rng.integers(len(REGIMES))]
        stop = first + int(rng.geometric(1.0 / regime.mean_bars))
        drift[first:stop] = regime.drift * rng.choice((-1.0, 1.0))
        pull[first:stop] = regime.pull
        volatility[first:stop] = regime.volatility
        starts[first] = True
        first = stop
    return drift, pull, volatility, starts
