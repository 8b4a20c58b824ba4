"""Structure flags: each by its definition, and none looks ahead.

python -m pytest tests/bars/test_structure.py
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from ctxtrain.bars.structure import MAX_LEG_INDEX, Bars, add_structure, average_true_range
from ctxtrain.synthetic.bars import SESSION_BARS, SYMBOLS, simulate


@pytest.fixture(scope="module", params=SYMBOLS, ids=lambda symbol: symbol.name)
def market(request: pytest.FixtureRequest) -> Bars:
    return simulate(np.random.default_rng(3), 3 * SESSION_BARS, request.param)


def path(points: Sequence[float], volumes: Sequence[float] | None = None) -> Bars:
    """Bars whose closes walk in steps of one from point to point; each leg may have its own volume."""
    closes, volume = [float(points[0])], [100.0]
    for leg, (start, stop) in enumerate(pairwise(points)):
        steps = int(abs(stop - start))
        closes += np.linspace(start, stop, steps + 1)[1:].tolist()
        volume += [volumes[leg] if volumes else 100.0] * steps
    return bars_of(closes, volume)


def bars_of(closes: Sequence[float], volumes: Sequence[float]) -> Bars:
    close = np.array(closes)
    return {"high": close + 0.5, "low": close - 0.5, "close": close, "volume": np.array(volumes)}


def mirrored(bars: Bars) -> Bars:
    return {**bars, "high": 1000 - bars["low"], "low": 1000 - bars["high"], "close": 1000 - bars["close"]}


def test_flags_do_not_look_ahead(market: Bars) -> None:
    bars = market
    for cut in (1, 2, 7, 50, 333, 1381, 2500):
        again = add_structure({name: bars[name][:cut] for name in ("high", "low", "close", "volume")})
        for name, values in again.items():
            assert np.array_equal(values, bars[name][:cut]), (name, cut)


def closes_where(bars: Bars, name: str) -> list[float]:
    values: list[float] = bars["close"][bars[name]].tolist()
    return values


def test_breaks_with_structure_are_bos_and_against_it_choch() -> None:
    # Swing highs 110.5, 113.5 and 117.5; swing lows 102.5 and 105.5. The first break only sets the direction.
    walk = path((100, 110, 103, 113, 106, 117, 98))
    bars = add_structure(walk)
    assert closes_where(bars, "ext_bos") == [114]
    assert closes_where(bars, "ext_choch") == closes_where(bars, "ext_choch_down") == [105]
    assert not bars["ext_choch_up"].any()
    assert bars["close"][bars["ext_dir"].argmax()] == 111
    assert bars["close"][bars["ext_dir"] == -1].tolist() == [105, 104, 103, 102, 101, 100, 99, 98]

    mirror = add_structure(mirrored(walk))
    assert np.array_equal(mirror["ext_dir"], -bars["ext_dir"])
    assert np.array_equal(mirror["ext_choch_up"], bars["ext_choch_down"])
    assert np.array_equal(mirror["ext_bos"], bars["ext_bos"])


def test_internal_structure_sees_swings_too_small_for_the_external() -> None:
    bars = add_structure(path((100, 103, 101, 104, 102, 105, 100)))
    assert closes_where(bars, "int_bos") == [105]
    assert closes_where(bars, "int_choch") == [101]
    assert not bars["ext_dir"].any()


def test_a_sweep_trades_through_the_last_swing_and_closes_back_inside() -> None:
    walk = path((100, 110, 103, 108, 106, 109, 104))
    # Two bars before the last, 105 is below the small swing low at 105.5 but above the large one at 102.5.
    walk["high"][-3], walk["low"][-3], walk["low"][-1] = 111.0, 105.0, 102.0
    bars = add_structure(walk)
    assert np.flatnonzero(bars["sweep_prev_high"]).tolist() == [len(walk["close"]) - 3]
    assert np.flatnonzero(bars["sweep_prev_low"]).tolist() == [len(walk["close"]) - 1]


def gaps(ranges: Sequence[tuple[float, float]]) -> Bars:
    low, high = np.array(ranges, dtype=float).T
    return {"high": high, "low": low, "close": (high + low) / 2, "volume": np.full(len(low), 10.0)}


def flags(bars: Bars, name: str) -> str:
    return "".join(str(int(value)) for value in bars[name])


def test_a_gap_is_active_until_filled_and_retested_by_trades_inside_it() -> None:
    #           before    jump      gap 10-11  away      touches 11  inside      fills it  after
    walk = gaps([(9, 10), (10, 12), (11, 13), (12, 13.5), (11, 13), (10.5, 12), (10, 12), (10, 12)])
    bars = add_structure(walk)
    assert flags(bars, "fvg_up") == "00111100"
    assert flags(bars, "fvg_retest") == "00001100"
    assert not bars["fvg_down"].any()

    mirror = add_structure(mirrored(walk))
    assert flags(mirror, "fvg_down") == "00111100"
    assert flags(mirror, "fvg_retest") == "00001100"
    assert not mirror["fvg_up"].any()


def test_a_new_gap_replaces_the_active_one() -> None:
    walk = gaps([(9, 10), (10, 12), (11, 13), (10.8, 11), (10.2, 10.7), (10.3, 10.9), (10.3, 10.95)])
    for bars, first, second in ((walk, "fvg_up", "fvg_down"), (mirrored(walk), "fvg_down", "fvg_up")):
        structure = add_structure(bars)
        assert flags(structure, first) == "0011000"
        assert flags(structure, second) == "0000111"
        assert flags(structure, "fvg_retest") == "0001011"


def test_legs_are_counted_from_the_break_against_structure() -> None:
    bars = add_structure(path((100, 110, 103, 113, 106, 117, 98, 103, 99, 102, 100, 102)))
    index = bars["mgann_leg_index"]
    assert closes_where(bars, "ext_choch") == [105]
    since = index[bars["ext_choch"].argmax() :].tolist()
    # From 105 down to 98 and one bar up; each later leg counts from its second bar.
    assert since == [1] * 9 + [2] * 5 + [3] * 4 + [4] * 3 + [5] * 2 + [6]


def test_the_leg_that_breaks_counts_once_even_if_it_turns_late() -> None:
    fall = path((100, 110, 103, 113, 106, 117, 98))["close"].tolist()
    # One bar jumps past the swing high at 117.5; the swing chart turns up only at the next.
    closes = [*fall, 118, 119, 120, 119, 118]
    bars = add_structure(bars_of(closes, [100.0] * len(closes)))
    assert closes_where(bars, "ext_choch_up") == [118]
    assert bars["mgann_leg_index"][-5:].tolist() == [1, 1, 1, 1, 2]


def test_the_leg_count_stops_at_its_cap() -> None:
    bars = add_structure(path((100, *(103, 100) * 12)))
    assert bars["mgann_leg_index"].max() == MAX_LEG_INDEX == bars["mgann_leg_index"][-1]


@pytest.mark.parametrize(("low_point", "volume", "weak"), [(114, 50, True), (114, 400, False), (108, 100, False)])
def test_a_pull_back_is_weak_by_travel_and_volume(low_point: float, volume: float, weak: bool) -> None:
    walk = path((100, 110, 103, 117, low_point), volumes=(100, 100, 100, volume))
    assert add_structure(walk)["ext_dir"][-1] == 1
    assert add_structure(walk)["pb_wave_strength_ok"][-1] == weak
    assert add_structure(mirrored(walk))["pb_wave_strength_ok"][-1] == weak


def test_strength_grows_with_travel_and_volume() -> None:
    weak, far, heavy = (
        add_structure(path((100, 110, top), volumes=(100, volume)))["wave_strength"][-1]
        for top, volume in ((104, 100), (100, 100), (104, 200))
    )
    assert 0 < weak < min(far, heavy)
    assert max(far, heavy) <= 100


def test_atr_is_wilders() -> None:
    bars = simulate(np.random.default_rng(1), 40, SYMBOLS[2])
    before = bars["close"][:-1]
    ranges = [bars["high"][0] - bars["low"][0]]
    ranges += (np.maximum(bars["high"][1:], before) - np.minimum(bars["low"][1:], before)).tolist()
    expected = float(np.mean(ranges[:14]))
    assert bars["atr_14"][13] == pytest.approx(expected, abs=1e-4)
    for t in range(14, 40):
        expected = (13 * expected + ranges[t]) / 14
        assert bars["atr_14"][t] == pytest.approx(expected, abs=1e-4)


def test_bars_without_movement_or_volume_have_no_strength() -> None:
    flat = {name: np.full(80, 5.0) for name in ("high", "low", "close")}
    bars = add_structure({**flat, "volume": np.zeros(80)})
    assert not bars["wave_strength"].any()
    assert not bars["pb_wave_strength_ok"].any()


@pytest.mark.parametrize("price", [0.00002, 0.0123, 1.08, 9.9])
def test_the_atr_of_low_prices_keeps_its_digits(price: float) -> None:
    steps = np.random.default_rng(1).normal(0, 1e-4, 300)
    close = price * np.exp(np.cumsum(steps))
    bars = {"high": close * 1.0001, "low": close * 0.9999, "close": close, "volume": np.ones(300)}
    exact = average_true_range(bars["high"], bars["low"], close)
    assert add_structure(bars)["atr_14"] == pytest.approx(exact, rel=1e-3)
