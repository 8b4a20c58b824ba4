"""Labels and outcomes equal a slow computation of their definition, and depend on no later bar.

python -m pytest tests/bars/test_triple_barrier.py
"""

import time

import numpy as np
import pytest
from numpy.typing import NDArray

from ctxtrain.bars.triple_barrier import Outcomes, triple_barrier
from ctxtrain.labels import LABELS
from ctxtrain.synthetic.bars import SYMBOLS, simulate

HORIZON = 20
Floats = NDArray[np.float64]
Market = tuple[Floats, Floats, Floats, Floats]


@pytest.fixture(scope="module")
def market() -> Market:
    bars = simulate(np.random.default_rng(8), 6_000, SYMBOLS[3])
    return bars["open"], bars["high"], bars["low"], bars["close"]


def walk(market: Market, event: int, side: int, profit: float, stop: float, horizon: int) -> tuple[float, int, bool]:
    """Result in R, bars until the exit, and whether the profit was reached; the prices of a bar one after the other."""
    opened, high, low, close = market
    entry = close[event]
    for step in range(1, horizon + 1):
        bar = event + step
        worst = low[bar] if side == 1 else high[bar]
        best = high[bar] if side == 1 else low[bar]
        for price, exact in ((opened[bar], False), (worst, True), (best, True)):  # pessimistic: the worst first
            if side * (price - entry) <= -stop:
                return (-1.0 if exact else side * (price - entry) / stop), step, False
            if side * (price - entry) >= profit:
                return profit / stop, step, True
    return side * (close[event + horizon] - entry) / stop, horizon, False


@pytest.mark.parametrize(("profit", "stop"), [(3.0, 2.0), (1.0, 1.0), (1.0, 3.0)])
def test_labels_and_outcomes_equal_a_slow_computation(market: Market, profit: float, stop: float) -> None:
    rng = np.random.default_rng(0)
    events = np.sort(rng.choice(5_900, 1_000, replace=False)) + 50
    unit = 0.06 * rng.uniform(0.5, 1.5, len(events))
    found = triple_barrier(*market, events, profit * unit, stop * unit, HORIZON)
    for n, event in enumerate(events.tolist()):
        long = walk(market, event, 1, profit * unit[n], stop * unit[n], HORIZON)
        short = walk(market, event, -1, profit * unit[n], stop * unit[n], HORIZON)
        assert (found.long.r_E[n], found.long.bars_E[n], found.long.won_E[n]) == pytest.approx(long)
        assert (found.short.r_E[n], found.short.bars_E[n], found.short.won_E[n]) == pytest.approx(short)
        wins = [(bars, label) for (_, bars, won), label in ((long, "LONG"), (short, "SHORT")) if won]
        first = min(wins, default=(0, "SKIP"))[1]
        label = "SKIP" if len(wins) == 2 and wins[0][0] == wins[1][0] else first
        assert LABELS[found.labels_E[n]] == label
    assert set(found.labels_E.tolist()) == {0, 1, 2}


def test_no_bar_after_the_horizon_counts(market: Market) -> None:
    events = np.arange(100, 3_000, 60)
    sizes = np.full(len(events), 0.15)
    before = triple_barrier(*market, events, sizes, sizes, HORIZON)
    for n, event in enumerate(events.tolist()):
        changed = [values.copy() for values in market]
        for values in changed:
            values[event + HORIZON + 1 :] += 5.0
        opened, high, low, close = changed
        after = triple_barrier(opened, high, low, close, np.array([event]), sizes[:1], sizes[:1], HORIZON)
        assert (after.labels_E[0], after.long.r_E[0], after.short.r_E[0]) == (
            before.labels_E[n], before.long.r_E[n], before.short.r_E[n],
        )  # fmt: skip


def one_event(*bars: tuple[float, float, float, float], profit: float = 2.0, stop: float = 1.0) -> Outcomes:
    """The event closes at 100; `bars` follow it."""
    opened, high, low, close = np.array([(100.0, 100.0, 100.0, 100.0), *bars]).T
    distances = np.array([profit]), np.array([stop])
    return triple_barrier(opened, high, low, close, np.array([0]), *distances, len(bars))


def results(found: Outcomes) -> tuple[str, float, float, bool]:
    label = LABELS[found.labels_E[0]]
    return label, float(found.long.r_E[0]), float(found.short.r_E[0]), bool(found.ambiguous_E[0])


QUIET = (100.0, 100.5, 99.5, 100.0)


@pytest.mark.parametrize(
    ("bars", "expected"),
    [
        ([QUIET, (100, 102, 99.5, 102)], ("LONG", 2.0, -1.0, False)),
        ([QUIET, (100, 100.5, 98, 98)], ("SHORT", -1.0, 2.0, False)),
        ([QUIET, (100, 100.9, 99.1, 100.4)], ("SKIP", 0.4, -0.4, False)),  # closed at the horizon
        ([(100, 102, 99, 101)], ("SKIP", -1.0, -1.0, True)),  # profit and stop on one bar: the stop
        ([(102, 102, 98, 100)], ("LONG", 2.0, -2.0, False)),  # opens at the profit, so the order is known
        ([(97, 99, 97, 98)], ("SHORT", -3.0, 2.0, False)),  # opens beyond the stop of the long trade
        ([(103, 104, 102, 103)], ("LONG", 2.0, -3.0, False)),  # the profit fills at the barrier, not at the open
        ([(100, 100.5, 99, 99.5), (100, 103, 100, 103)], ("SKIP", -1.0, -1.0, False)),  # stopped before its profit
    ],
)
def test_each_way_out_of_a_trade(
    bars: list[tuple[float, float, float, float]], expected: tuple[str, float, float, bool]
) -> None:
    label, long, short, ambiguous = results(one_event(*bars))
    assert (label, ambiguous) == (expected[0], expected[3])
    assert (long, short) == pytest.approx(expected[1:3])


def test_both_profits_on_one_bar_are_no_label() -> None:
    assert results(one_event((100, 101, 99, 100), profit=1.0, stop=2.0)) == ("SKIP", 0.5, 0.5, True)


def test_a_million_events_take_seconds() -> None:
    rng = np.random.default_rng(1)
    close = 100 + rng.normal(0, 0.1, 1_000_021).cumsum()
    sizes = np.full(1_000_000, 0.3)
    start = time.process_time()
    found = triple_barrier(close, close + 0.1, close - 0.1, close, np.arange(1_000_000), sizes, sizes, 20)
    assert len(found.labels_E) == 1_000_000
    assert time.process_time() - start < 20
