"""Events are bars on which a flag becomes true; flags come from the file or from the structure of the bars.

python -m pytest tests/bars/test_events.py
"""

from typing import Any

import numpy as np
import pytest

from ctxtrain.bars.events import add_flags, find_events
from ctxtrain.bars.options import WindowOptions, parse_window_options
from ctxtrain.bars.series import Series
from ctxtrain.bars.structure import Bars, add_structure, higher_direction
from ctxtrain.data.time_units import SECOND
from ctxtrain.errors import ConfigError, DataError
from ctxtrain.synthetic.bars import SYMBOLS, simulate

MINUTE = 60 * SECOND
BARS = ("open", "high", "low", "close", "volume")


@pytest.fixture(scope="module")
def market() -> Bars:
    return simulate(np.random.default_rng(4), 3000, SYMBOLS[0])


def series_of(market: Bars, **columns: Any) -> Series:
    opens = market["time"].astype("datetime64[ns]").astype(np.int64)
    numbers = {name: market[name].astype(np.float64) for name in BARS}
    extra = {name: np.array(values, np.float64) for name, values in columns.items()}
    return Series("ES", opens, numbers | extra, {})


def options(**given: Any) -> WindowOptions:
    defaults: dict[str, Any] = {
        "events": "every", "bars": 30, "structure": False, "higher": None, "label": "triple-barrier", "profit": None,
        "stop": None, "horizon": None, "cost": None, "split": "70,15,15", "max_gap": None,
    }  # fmt: skip
    return parse_window_options(**defaults | given)


def begins(flags: Any) -> list[int]:
    values = [bool(flag) for flag in flags]
    return [n for n, value in enumerate(values) if value and not (n and values[n - 1])]


def test_every_bar_or_every_nth_is_an_event(market: Bars) -> None:
    series = series_of(market)
    assert find_events(series, "every").tolist() == list(range(3000))
    assert find_events(series, 7).tolist() == list(range(6, 3000, 7))


@pytest.mark.parametrize("name", ["fvg_retest", "ext_bos", "ext_choch", "int_bos", "int_choch", "sweep_prev_low"])
def test_a_flag_of_the_structure_is_computed_where_the_file_lacks_it(name: str, market: Bars) -> None:
    events = find_events(series_of(market), name).tolist()
    assert events == begins(market[name])
    assert len(events) > 20


def test_a_flag_with_a_side_has_the_direction_of_the_break(market: Bars) -> None:
    series = series_of(market)
    up, down = (set(find_events(series, f"int_choch_{side}").tolist()) for side in ("up", "down"))
    assert up | down == {n for n, flag in enumerate(market["int_choch"]) if flag}
    assert {int(market["int_dir"][n]) for n in up} == {1}
    assert {int(market["int_dir"][n]) for n in down} == {-1}


def test_a_flag_of_the_file_comes_first_and_its_two_sides_make_one(market: Bars) -> None:
    own = np.zeros(3000)
    own[[10, 11, 50]] = 1
    other = np.zeros(3000)
    other[[12, 80]] = 1
    assert find_events(series_of(market, ext_bos=own), "ext_bos").tolist() == [10, 50]
    assert find_events(series_of(market, ext_bos_up=own, ext_bos_down=other), "ext_bos").tolist() == [10, 50, 80]
    assert find_events(series_of(market, signal=own), "signal").tolist() == [10, 50]


def test_a_flag_that_is_unknown_on_a_bar_is_not_true(market: Bars) -> None:
    own = np.zeros(3000)
    own[[10, 12]] = 1
    own[11] = np.nan
    assert find_events(series_of(market, signal=own), "signal").tolist() == [10, 12]


def test_flags_as_words_are_events_and_other_words_are_not(market: Bars) -> None:
    series = series_of(market)
    words = [["false", "TRUE", None, True][n % 4] for n in range(3000)]
    flagged = Series("ES", series.opens_T, series.columns, {"signal": words})
    assert find_events(flagged, "signal").tolist() == [n for n in range(3000) if n % 4 in (1, 3)]
    session = Series("ES", series.opens_T, series.columns, {"signal": ["Asia"] * 3000})
    with pytest.raises(DataError, match='the event signal must be true or false on each bar, got "Asia"'):
        find_events(session, "signal")


def test_what_is_no_flag_is_refused_with_those_that_are(market: Bars) -> None:
    with pytest.raises(ConfigError, match=r"got 'fvg'\. Use one of ext_bos, ext_choch, .*fvg_retest"):
        find_events(series_of(market), "fvg")
    with pytest.raises(DataError, match="the event close must be true or false on each bar, got"):
        find_events(series_of(market), "close")


def test_structure_adds_the_flags_that_the_file_lacks(market: Bars) -> None:
    own = np.full(3000, 2.5)
    flagged, notes = add_flags(series_of(market, atr_14=own), options(structure=True), MINUTE)
    computed = add_structure({name: market[name] for name in ("high", "low", "close", "volume")})
    for name in ("ext_dir", "fvg_up", "mgann_leg_index", "wave_strength"):
        assert np.array_equal(flagged.columns[name], computed[name]), name
    assert (flagged.columns["atr_14"] == 2.5).all()
    assert notes == ["structure: computed 16 fields; from the file: atr_14"]


def slow_direction(series: Series, times: int, bar: int) -> int:
    """The direction of the structure of the long bars that have ended when `bar` closes."""
    long = times * MINUTE
    now = int(series.opens_T[bar]) + MINUTE
    groups: dict[int, list[int]] = {}
    for n in range(bar + 1):
        groups.setdefault(int(series.opens_T[n]) // long, []).append(n)
    ended = [places for number, places in groups.items() if (number + 1) * long <= now]
    if not ended:
        return 0
    columns = series.columns
    bars = {
        "high": np.array([columns["high"][places].max() for places in ended]),
        "low": np.array([columns["low"][places].min() for places in ended]),
        "close": np.array([columns["close"][places[-1]] for places in ended]),
        "volume": np.ones(len(ended)),
    }
    return int(add_structure(bars)["ext_dir"][-1])


@pytest.mark.parametrize("times", [2, 5, 15])
def test_the_direction_of_a_higher_timeframe_is_that_of_its_completed_bars(times: int, market: Bars) -> None:
    kept = np.delete(np.arange(1600), [*range(700, 733), 1001, 1004])  # with gaps, also at the end of a long bar
    series = series_of({name: values[kept] for name, values in market.items()})
    flagged, _ = add_flags(series, options(higher=times), MINUTE)
    found = flagged.columns["htf_dir"]
    bars = [*range(0, 60, 7), *range(600, 1500, 53), *range(965, 985)]
    assert [int(found[bar]) for bar in bars] == [slow_direction(series, times, bar) for bar in bars]
    assert len(set(found.tolist())) > 1


def test_a_long_bar_counts_at_the_close_of_its_last_bar(market: Bars) -> None:
    opens = np.arange(2000) * MINUTE
    high, low, close = (market[name][:2000] for name in ("high", "low", "close"))
    direction = higher_direction(opens, high, low, close, MINUTE, 10)
    changes = np.flatnonzero(np.diff(direction)) + 1
    assert len(changes) > 2
    assert set((changes % 10).tolist()) == {9}
