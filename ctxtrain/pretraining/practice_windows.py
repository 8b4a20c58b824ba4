"""Simulated windows for pre-training: rendered texts, and the statistics that can be computed from them.

Input: a random generator and a number of windows. Output: `PracticeWindows`, texts and targets. Half of the bars come
from the market of `synthetic/bars.py` with randomly drawn symbols, half from a simpler one with more variety: legs of
random length, drift, volatility and effort. Windows differ in length and in their fields, so that the base model
depends on none of them. No label and no label rule is simulated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from ctxtrain.bars.structure import Bars, add_structure
from ctxtrain.data.codec import PULSES, STATES, Codec
from ctxtrain.data.features import true_range, window_numbers
from ctxtrain.data.levels import FeatureScale
from ctxtrain.data.parse_window import Window
from ctxtrain.pretraining.statistics import bar_statistics, event_statistics
from ctxtrain.pretraining.window_arrays import Floats, WindowArrays
from ctxtrain.synthetic.bars import Symbol, simulate

SERIES_BARS = 2400
MIN_PRACTICE_BARS, MAX_PRACTICE_BARS = 30, 50  # of a window
WINDOWS_PER_SERIES = 48
RETEST_SHARE = 0.5  # of windows, which end where a gap is retested; the others end anywhere
RENDERED_FLAGS = {"all": 0.1, "some": 0.2, "none": 0.7}  # share of windows whose text has these flags
FOREIGN_SHARE = 0.2  # of windows, with flags from another window: the model must read them, not derive them
FOREIGN = "foreign"
DELTA_SHARE, ATR_SHARE = 0.8, 0.5
MAX_FEATURES = 4
# Fields that practice windows do not have, so that the embedded base has not seen their marks.
_UNSEEN = frozenset(
    {
        *("htf_dir", "ext_bos_up", "ext_bos_down", "int_bos_up", "int_bos_down", "int_choch_up", "int_choch_down"),
        "mgann_leg_first_fvg",
    }
)
FLAGS = tuple(name for name in (*STATES, *PULSES) if name not in _UNSEEN)
OPEN_SCALE = FeatureScale(centre=0.0, spread=1.0)


@dataclass(frozen=True)
class PracticeWindows:
    """`texts` of W windows, and their statistics: `bar_WLP` at each of L bars up to the event, `event_WE` at the event.

    Values are NaN for missing bars and for statistics that a window cannot have.
    """

    texts: list[str]
    bar_WLP: NDArray[np.float32]
    event_WE: NDArray[np.float32]
    bar_names: list[str]
    event_names: list[str]


def practice_windows(rng: Generator, count: int) -> PracticeWindows:
    """Simulate `count` windows."""
    windows: list[Window] = []
    while len(windows) < count:
        market = _symbol_market if rng.random() < 0.5 else _leg_market
        windows += _cut_windows(rng, market(rng, SERIES_BARS), min(WINDOWS_PER_SERIES, count - len(windows)))
    texts = [_random_codec(rng, window).render(window) for window in windows]
    arrays = _to_arrays(windows)
    bar_table, event_table = bar_statistics(arrays), event_statistics(arrays)
    event_table |= _tail_statistics(windows)
    return PracticeWindows(
        texts=texts,
        bar_WLP=np.stack([*bar_table.values()], axis=-1).astype(np.float32),
        event_WE=np.stack([*event_table.values()], axis=-1).astype(np.float32),
        bar_names=list(bar_table),
        event_names=list(event_table),
    )


def _symbol_market(rng: Generator, bars: int) -> Bars:
    price = _log_uniform(rng, 1.0, 40_000.0)
    volatility = float(np.exp(rng.uniform(np.log(5e-5), np.log(2e-3))))
    symbol = Symbol(
        "practice",
        price=price,
        tick=price * volatility * _log_uniform(rng, 0.01, 0.5),
        volatility=volatility,
        volume=_log_uniform(rng, 20.0, 5000.0),
    )
    return simulate(rng, bars, symbol, first_bar=int(rng.integers(100_000)))


def _leg_market(rng: Generator, bars: int) -> Bars:
    """A sequence of legs, each with its drift, volatility, effort (volume) and side (delta)."""
    leg_bars = _log_uniform(rng, 3.0, 30.0)
    leg = np.cumsum(rng.random(bars) < 1 / leg_bars)
    legs = int(leg[-1]) + 1
    flips = np.where(rng.random(legs) < rng.uniform(0.3, 0.9), -1.0, 1.0)
    direction = np.cumprod(flips) * np.abs(rng.standard_normal(legs)) * _log_uniform(rng, 0.1, 1.2)
    deviation = np.exp(rng.uniform(0.0, 0.7) * rng.standard_normal(legs))[leg]
    shock = rng.standard_t(rng.uniform(3, 30), bars)
    move = deviation * (direction[leg] + shock)
    wick = _log_uniform(rng, 0.1, 1.0)
    gap = rng.standard_normal(bars) * (rng.random(bars) < rng.uniform(0, 0.3)) * rng.uniform(0, 1)
    close = np.cumsum(move + gap)
    open_ = close - move
    high = np.maximum(open_, close) + wick * deviation * rng.exponential(1.0, bars)
    low = np.minimum(open_, close) - wick * deviation * rng.exponential(1.0, bars)
    tick = _log_uniform(rng, 0.01, 0.5)
    paths = {"open": open_, "high": high, "low": low, "close": close}
    prices = {name: np.rint(path / tick) * tick for name, path in paths.items()}
    level = _log_uniform(rng, 300.0, 30_000.0) - min(0.0, float(prices["low"].min()))
    effort = np.exp(rng.uniform(0.1, 0.8) * rng.standard_normal(legs) + rng.uniform(-0.5, 0.8) * np.abs(direction))[leg]
    response, noise = rng.uniform(0, 1), np.exp(rng.uniform(0.1, 0.6) * rng.standard_normal(bars))
    volume = effort * (1 - response + response * np.abs(shock)) * noise
    volume = 1 + np.rint(volume * _log_uniform(rng, 10.0, 5000.0))
    side = rng.uniform(0, 0.6) * np.tanh(shock) + rng.uniform(-0.3, 0.6) * np.tanh(direction)[leg]
    delta = np.rint(volume * np.clip(side + rng.uniform(0.05, 0.4) * rng.standard_normal(bars), -0.95, 0.95))
    shifted = {name: path + level for name, path in prices.items()}
    return add_structure({**shifted, "volume": volume, "delta": delta})


def _log_uniform(rng: Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _cut_windows(rng: Generator, bars: Bars, count: int) -> list[Window]:
    """Cut windows that end at random bars or retests. Some take their flags from other bars."""
    length = len(bars["close"])
    ends = rng.integers(2 * MAX_PRACTICE_BARS, length, size=count)
    retests = np.flatnonzero(bars["fvg_retest"][2 * MAX_PRACTICE_BARS :]) + 2 * MAX_PRACTICE_BARS
    if len(retests):
        ends = np.where(rng.random(count) < RETEST_SHARE, rng.choice(retests, count), ends)
    windows = []
    for end in (ends + 1).tolist():
        size = int(rng.integers(MIN_PRACTICE_BARS, MAX_PRACTICE_BARS, endpoint=True))
        names = ["open", "high", "low", "close", "volume"] + ["delta"] * bool(rng.random() < DELTA_SHARE)
        cut = {name: bars[name][end - size : end].astype(np.float64) for name in names}
        if rng.random() < ATR_SHARE:
            cut["atr_14"] = bars["atr_14"][end - size : end]
        foreign = rng.random() < FOREIGN_SHARE
        flag_end = int(rng.integers(2 * MAX_PRACTICE_BARS, length)) if foreign else end
        known = _random_flags(rng) if foreign and rng.random() < 0.5 else FLAGS
        flags = {name: bars[name][flag_end - size : flag_end].astype(np.float64) for name in known}
        features = {f"z{k}": float(rng.standard_normal()) for k in range(int(rng.integers(MAX_FEATURES + 1)))}
        windows.append(Window(FOREIGN if foreign else "", None, None, {**cut, **flags}, features))
    return windows


def _random_flags(rng: Generator) -> tuple[str, ...]:
    return tuple(name for name in FLAGS if rng.random() < 0.5)


def _random_codec(rng: Generator, window: Window) -> Codec:
    """A codec with a random choice of flags; foreign flags are all rendered, since the bars do not determine them."""
    rendered = "all"
    if window.location != FOREIGN:
        rendered = str(rng.choice(list(RENDERED_FLAGS), p=list(RENDERED_FLAGS.values())))
    flags = {"all": FLAGS, "none": (), "some": _random_flags(rng)}[rendered]
    fields = [name for name in window.bars if name not in FLAGS or name in flags]
    return Codec(kind="compact", fields=fields, features=dict.fromkeys(window.features, OPEN_SCALE))


def _to_arrays(windows: list[Window]) -> WindowArrays:
    shape = (len(windows), MAX_PRACTICE_BARS)
    columns = {name: np.zeros(shape) for name in ("open", "high", "low", "close", "volume", "delta", *FLAGS)}
    exists = np.zeros(shape, dtype=np.bool_)
    mean_range = np.zeros(len(windows))
    for row, window in enumerate(windows):
        numbers = window_numbers(window.bars)
        size = len(numbers.close)
        exists[row, -size:] = True
        for name in ("open", "high", "low", "close"):
            columns[name][row] = numbers.open[0]
            columns[name][row, -size:] = getattr(numbers, name)
        columns["volume"][row, -size:] = numbers.volume
        columns["delta"][row, -size:] = np.nan if numbers.delta is None else numbers.delta
        for name in FLAGS:
            columns[name][row, -size:] = window.bars.get(name, np.nan)
        height = float(window.bars["high"].max() - window.bars["low"].min())
        mean_range[row] = float(true_range(window.bars).mean()) / height if height > 0 else 0.0
    prices = {name: columns[name] for name in ("open", "high", "low", "close", "volume", "delta")}
    return WindowArrays(**prices, exists=exists, flags={name: columns[name] for name in FLAGS}, bar_range_W=mean_range)


def _tail_statistics(windows: list[Window]) -> dict[str, Floats]:
    """Statistics of the tail after the bars: scale of the window, and the entries of `features` in order."""
    numbers = [window_numbers(window.bars) for window in windows]
    table = {
        "range_in_bars": np.log(np.maximum([n.range_in_bars for n in numbers], 1.0)),
        "bar_range_share": np.log(np.maximum([n.bar_range_share for n in numbers], 1e-6)),
        "atr_ratio": np.array([np.nan if n.atr_ratio is None else np.clip(n.atr_ratio, 0, 4) for n in numbers]),
    }
    for k in range(MAX_FEATURES):
        table[f"feature_{k}"] = np.array([window.features.get(f"z{k}", np.nan) for window in windows])
    return table
