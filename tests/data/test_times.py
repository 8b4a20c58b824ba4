"""Times of bars: their unit, one per file and told from the values; their order; positions in any unit."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctxtrain.data.check import check_files
from ctxtrain.data.leakage import POSITION_KINDS
from ctxtrain.data.parse_window import Window
from ctxtrain.data.positions import collect_positions
from ctxtrain.data.profile import extent, survey
from ctxtrain.data.separation import purged_rows
from ctxtrain.data.time_units import ISO, NAIVE, PLAIN_NUMBER, UNITS, parse_time
from ctxtrain.data.walk_forward import walk_forward
from ctxtrain.data.window_file import WindowFile
from ctxtrain.errors import ConfigError
from ctxtrain.evaluation.blocks import assign_blocks
from ctxtrain.evaluation.worst_errors import confident_mistakes
from tests.helpers import Row, bars_of, dated_rows, make_row, make_window, read, write_rows

START = datetime(2025, 3, 3, tzinfo=UTC)


def since(moment: datetime, of_a_second: int) -> int:
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) * of_a_second // 10**6


WRITTEN: dict[str, Callable[[datetime], Any]] = {
    "ISO": lambda moment: moment.isoformat(),
    "ISO without a zone": lambda moment: moment.replace(tzinfo=None).isoformat(sep=" "),
    "ISO in another zone": lambda moment: moment.astimezone(timezone(timedelta(hours=-5, minutes=-30))).isoformat(),
    "seconds": lambda moment: since(moment, 1),
    "seconds as a float": lambda moment: float(since(moment, 1)),
    "milliseconds": lambda moment: since(moment, 10**3),
    "microseconds": lambda moment: since(moment, 10**6),
    "nanoseconds": lambda moment: since(moment, 10**9),
}


def timed(rows: list[Row], written: str, *, index: bool = False) -> list[Row]:
    """The rows of `dated_rows` with their times written in another way."""
    rows = json.loads(json.dumps(rows))
    for bar in (bar for row in rows for bar in bars_of(row)):
        bar["time"] = WRITTEN[written](datetime.fromisoformat(bar["time"]))
        if not index:
            del bar["bar_index"]
    return rows


def places(rows: list[Row]) -> list[Row]:
    """Rows with prices of their own, so that only places can join them."""
    return [row | {"id": None} for row in rows]


def by_place(report: dict[str, Any]) -> dict[str, int]:
    return {leak["kind"]: leak["count"] for leak in report["leaks"] if leak["kind"] in POSITION_KINDS}


@pytest.mark.parametrize("written", WRITTEN)
def test_a_moment_is_the_same_to_the_nanosecond_however_it_is_written(written: str) -> None:
    moment = START + timedelta(hours=7, minutes=3, seconds=1)
    stamp, unit = parse_time(WRITTEN[written](moment))
    assert stamp == since(moment, 10**9)
    iso = NAIVE if "without" in written else ISO
    assert unit == (iso if "ISO" in written else f"{written.removesuffix(' as a float')} since 1970")


def test_fractions_are_exact() -> None:
    assert parse_time("2025-03-03T00:00:00.123456789Z")[0] == since(START, 10**9) + 123_456_789
    assert parse_time("2025-03-03T00:00:00,1234567Z")[0] == since(START, 10**9) + 123_456_700
    assert parse_time("20250303T000000.123456789Z")[0] == since(START, 10**9) + 123_456_789
    assert parse_time("20250303T010000.1234567+0100")[0] == since(START, 10**9) + 123_456_700
    assert parse_time("2025-W10-1T00:00:00.000000001")[0] == since(START, 10**9) + 1
    assert parse_time("2025-03-03T00:00:00.123456+00:00")[0] == since(START, 10**9) + 123_456_000
    assert parse_time(since(START, 1) + 0.25)[0] == since(START, 10**9) + 250_000_000
    assert parse_time(since(START, 10**9) + 1)[0] == since(START, 10**9) + 1


@pytest.mark.parametrize("value", [0, 59.5, -60, 99_999_999, 20250303])
def test_a_number_too_small_for_a_date_is_a_number_of_no_unit(value: float) -> None:
    assert parse_time(value) == (round(value * 10**9), PLAIN_NUMBER)


@pytest.mark.parametrize(
    "value", [20250303140000, 202503031400, -(10**10), 5 * 10**10, 10**19, float("nan"), float("inf"), 10**400]
)
def test_a_number_that_is_no_time_in_any_unit_is_refused(value: float) -> None:
    row = make_row()
    row["current_bar"]["time"] = value
    for bar in row["context_bars"]:
        del bar["time"]
    (fault,) = (
        read([json.dumps(row).encode()]).faults if abs(value) < 1e300 else ["rows.jsonl:1: time must be ISO 8601"]
    )
    assert "time must be ISO 8601" in fault
    with pytest.raises(ValueError, match="must be ISO 8601 text, or seconds, milli-"):
        parse_time(value)


@pytest.mark.parametrize("value", ["0001-01-01", "1799-12-31T23:59:59Z", "2200-01-01", "9999-12-31T23:59:59-12:00"])
def test_a_year_far_away_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="must be in the years 1800 to 2199"):
        parse_time(value)


@pytest.mark.parametrize("value", ["1800112212000", "1741010400", "20250303140000"])
def test_a_number_in_quotes_is_no_iso_text(value: str) -> None:
    """The first is of 2027 in milliseconds; datetime would read the year 1800."""
    with pytest.raises(ValueError, match="Write numbers without quotes"):
        parse_time(value)


@pytest.mark.parametrize("written", WRITTEN)
def test_leaks_are_found_and_purged_whatever_the_units_of_two_files(written: str, tmp_path: Path) -> None:
    rows = dated_rows(60, seed=1, apart=10)
    files = {"train": timed(rows[:40], "ISO"), "val": timed(rows[36:], written)}
    for row in files["val"]:
        for bar in bars_of(row):
            bar["volume"] += 1000
    paths: dict[str, Path | None] = {
        name: write_rows(tmp_path / f"{name}.jsonl", places(rows)) for name, rows in files.items()
    }
    report = check_files(paths)
    assert report["faults"] == []
    assert by_place(report) == {"shared bars": 6, "training on later rows": 3}
    surveys = {name: survey(WindowFile(path))[0] for name, path in paths.items() if path}
    assert purged_rows(surveys, 0)["train"].tolist() == [*range(34, 40)]
    assert purged_rows(surveys, 25)["train"].tolist() == [*range(31, 40)]
    assert report["times"]["val"]["time_unit"] == surveys["val"].file.report.notices.time_unit()
    assert report["times"]["val"]["first_event"] == "2025-03-03T06:29:00+00:00"
    assert report["times"]["val"]["last_event"] == "2025-03-03T10:19:00+00:00"


@pytest.mark.parametrize("written", WRITTEN)
def test_folds_blocks_and_mistakes_know_the_day_whatever_the_unit(written: str, tmp_path: Path) -> None:
    rows = timed(dated_rows(72, seed=1, apart=240), written)  # six a day, twelve days
    windows = [make_window(row) for row in rows]
    blocks = assign_blocks(collect_positions(windows))
    assert (blocks.count, blocks.trusted) == (12, True)
    assert np.bincount(blocks.block_N).tolist() == [6] * 12
    surveyed, error = survey(WindowFile(write_rows(tmp_path / "rows.jsonl", rows[::-1])))
    assert error is None
    for fold in walk_forward(surveyed, 2):
        assert fold["train"].min() > fold["val"].max()  # the file runs backwards, the folds do not
        assert fold["val"].min() > fold["test"].max()
    shown = confident_mistakes(lambda rows: [windows[n] for n in rows], np.array([1]), np.array([[0.6, 0.3, 0.1]]))
    assert shown[0]["time"] == "2025-03-03T00:29:00+00:00"
    assert extent(surveyed)["last_event"] == "2025-03-14T20:29:00+00:00"


@pytest.mark.parametrize(("one", "other"), [("ISO", "seconds"), ("milliseconds", "seconds"), ("seconds", "ISO")])
def test_two_units_in_a_file_are_refused_with_both_places(one: str, other: str) -> None:
    rows = dated_rows(4, seed=1, apart=60)
    mixed = timed(rows[:2], one) + timed(rows[2:], other)
    units = [read([json.dumps(row).encode()]).notices.time_unit() for row in (mixed[0], mixed[2])]
    lines = [json.dumps(row).encode() for row in mixed]
    (fault,) = read(lines).faults
    assert fault == (
        f"rows.jsonl:3: the times of a file must have one unit, but here they are {units[1]}, and {units[0]} at "
        "rows.jsonl:1. Write all times in one unit."
    )
    assert read(lines, labelled=False).faults == []  # no answer depends on a time


@pytest.mark.parametrize("late", [0, "2025-03-03T10:59:00Z", 1_741_000_000_000])
def test_two_units_in_a_row_are_refused_with_both_places(late: object) -> None:
    (row,) = timed([make_row()], "seconds")
    row["current_bar"]["time"] = late
    (fault,) = read([json.dumps(row).encode()]).faults
    first = row["context_bars"][0]["time"]
    assert fault.startswith(
        f"rows.jsonl:1: time must have one unit in a file, but {first} at context_bars[0] is seconds since 1970 and "
        f"{json.dumps(late)} at current_bar is "
    )


def numbered(count: int, start: int = 0) -> list[Row]:
    rows = dated_rows(count, seed=start, apart=10)
    for n, row in enumerate(rows):
        for place, bar in enumerate(bars_of(row)):
            number = start + 10 * n + place
            bar["time"] = 60 * number
            bar.update(dict.fromkeys(("open", "high", "low", "close"), 2000 + number % 71))  # a number is one bar
            del bar["bar_index"]
    return rows


def test_times_that_count_from_anywhere_compare_with_their_kind_only(tmp_path: Path) -> None:
    plain = write_rows(tmp_path / "plain.jsonl", places(numbered(20)))
    later = write_rows(tmp_path / "later.jsonl", places(numbered(20, start=180)))
    dated = write_rows(tmp_path / "dated.jsonl", places(timed(dated_rows(20, seed=3, apart=10), "seconds")))
    report = check_files({"train": plain, "val": later})
    assert by_place(report) == {"shared bars": 4, "training on later rows": 1}
    assert [line for line in report["noticed"]["train"] if line.startswith("times are plain numbers")]
    assert report["times"]["train"]["first_event"] is None
    report = check_files({"train": plain, "val": dated})
    assert by_place(report) == {}
    reason = "times are plain numbers in train, dates in val, which do not compare"
    assert report["unchecked"][0] == f"shared bars, training on later rows: {reason}"
    surveys = {name: survey(WindowFile(path))[0] for name, path in (("train", plain), ("val", dated))}
    with pytest.raises(ValueError, match=reason):
        purged_rows(surveys, 0)
    blocks = assign_blocks(collect_positions(make_window(row) for row in numbered(3) + numbered(3, start=500)))
    assert blocks.count == 2
    assert blocks.note == "windows that share bars; times are plain numbers without days"


# A row without a place


def without_time(row: Row, *bars: int) -> Row:
    row = json.loads(json.dumps(row))
    for bar in bars:
        bars_of(row)[bar]["time"] = None
    return row


@pytest.mark.parametrize("lacking", [(0,), (29,), tuple(range(30))])
def test_a_row_without_a_place_leaves_the_others_theirs(lacking: tuple[int, ...], tmp_path: Path) -> None:
    """They all have a bar_index, which begins anew each day: by it windows of different days would share bars."""
    rows = dated_rows(40, seed=1, apart=60)
    for n, row in enumerate(rows):
        for place, bar in enumerate(bars_of(row)):
            bar["bar_index"] = n % 24 * 60 + place
    files = {"train": [*rows[:30], without_time(rows[30], *lacking)], "val": rows[31:]}
    paths: dict[str, Path | None] = {
        name: write_rows(tmp_path / f"{name}.jsonl", places(rows)) for name, rows in files.items()
    }
    report = check_files(paths)
    assert by_place(report) == {}
    assert report["unchecked"][0] == "the position of 1 of 31 train rows: their first or last bar has no time"
    assert len(report["unchecked"]) == 2  # the other: too few rows to look for a rule of the labels
    surveys = {name: survey(WindowFile(path))[0] for name, path in paths.items() if path}
    assert purged_rows(surveys, 0)["train"].tolist() == [30]
    assert report["times"]["train"]["rows_without_time"] == 1
    with pytest.raises(ConfigError, match="1 of 31 have no time on their first or last bar"):
        walk_forward(surveys["train"], 2)
    shown = [*rows[:30], *(without_time(row, *lacking) for row in rows[30:33])]
    blocks = assign_blocks(collect_positions(make_window(row) for row in shown))
    assert blocks.note.endswith("; 3 of 33 rows without a known time are one block")
    assert len(set(blocks.block_N[30:].tolist())) == 1
    assert not set(blocks.block_N[30:].tolist()) & set(blocks.block_N[:30].tolist())


def test_a_time_that_only_bars_in_the_middle_lack_is_said_and_takes_no_place_away(tmp_path: Path) -> None:
    rows = [without_time(row, 4, 9) for row in dated_rows(3, seed=1, apart=60)]
    (surveyed, _) = survey(WindowFile(write_rows(tmp_path / "rows.jsonl", rows)))
    assert extent(surveyed)["first_event"] == "2025-03-03T00:29:00+00:00"
    assert list(surveyed.file.report.notices.lines()) == [
        "time is missing on 6 bars in 3 of 3 rows; a row whose first or last bar lacks it has no position by it"
    ]


# A bar_index that begins anew


def of_days(days: int, a_day: int) -> list[Row]:
    """Windows of several days without a time, whose bar_index begins anew each day."""
    rows = [make_row(seed=100 * day + n, place=False, id=None) for day in range(days) for n in range(a_day)]
    for n, row in enumerate(rows):
        for place, bar in enumerate(bars_of(row)):
            bar["bar_index"] = n % a_day * 60 + place
    return rows


@pytest.mark.parametrize(("days", "a_day"), [(2, 4), (12, 3)])
def test_a_bar_index_that_begins_anew_places_nothing(days: int, a_day: int, tmp_path: Path) -> None:
    rows = of_days(days, a_day)
    half = len(rows) // 2
    paths: dict[str, Path | None] = {
        "train": write_rows(tmp_path / "train.jsonl", rows[:half]),
        "val": write_rows(tmp_path / "val.jsonl", rows[half:]),
    }
    report = check_files(paths)
    assert by_place(report) == {}
    assert report["unchecked"][0] == (
        f"shared bars, training on later rows: bar_index restarts ({len(rows) - a_day} of {len(rows)} windows have "
        "other prices at a number than an earlier one), and there is no time"
    )
    blocks = assign_blocks(collect_positions(make_window(row) for row in rows))
    assert blocks.count == len(rows)
    assert "bar_index restarts" in blocks.note
    with pytest.raises(ConfigError, match=r"evaluation\.folds orders rows by time, but bar_index restarts"):
        walk_forward(survey(WindowFile(write_rows(tmp_path / "all.jsonl", rows)))[0], 2)


STRIDES: dict[str, Callable[[int], int]] = {
    "five minutes a bar": lambda bar: 570 + 5 * bar,
    "ten minutes a bar, from a quarter past": lambda bar: 555 + 10 * bar,
    "a number left out": lambda bar: bar + (bar > 20),
    "every third number left out": lambda bar: bar * 3 // 2,
    "counted back from the event": lambda bar: bar - 29,
}


@pytest.mark.parametrize("field", ["bar_index", "time"])
@pytest.mark.parametrize("numbers", STRIDES)
def test_numbers_that_begin_anew_place_nothing_whatever_their_steps(numbers: str, field: str, tmp_path: Path) -> None:
    rows = [make_row(seed=n, place=False, id=None) for n in range(30)]
    for n, row in enumerate(rows):
        for place, bar in enumerate(bars_of(row)):
            bar[field] = STRIDES[numbers](place + n % 5)
    paths = {"train": write_rows(tmp_path / "a.jsonl", rows[:20]), "val": write_rows(tmp_path / "b.jsonl", rows[20:])}
    report = check_files(dict(paths))
    assert by_place(report) == {}
    assert "restart" in report["unchecked"][0]


@pytest.mark.parametrize("field", ["bar_index", "time"])
@pytest.mark.parametrize("numbers", STRIDES)
def test_numbers_that_go_on_place_windows_whatever_their_steps(numbers: str, field: str, tmp_path: Path) -> None:
    """Windows of one market: a number has the same bar in all of them."""
    market = [bar for n in range(20) for bar in bars_of(make_row(seed=n, place=False, bars=30))]
    for n, bar in enumerate(market):
        bar[field] = STRIDES[numbers](n)
    rows = [make_row(place=False, id=None) for _ in range(60)]
    for n, row in enumerate(rows):
        bars = json.loads(json.dumps(market[9 * n : 9 * n + 30]))
        row["context_bars"], row["current_bar"] = bars[:-1], bars[-1] | {"volume": 1000 + n}
    paths = {"train": write_rows(tmp_path / "a.jsonl", rows[:40]), "val": write_rows(tmp_path / "b.jsonl", rows[40:])}
    assert by_place(check_files(dict(paths))) == {"shared bars": 3}


# Other names of the time


def named(row: Row, name: str, *, turned: bool = False, written: str = "ISO") -> Row:
    """The row with its times under another name, and newest first if turned."""
    (row,) = timed([row], written)
    bars = bars_of(row)
    times = [bar.pop("time") for bar in bars]
    for bar, time in zip(bars, times[::-1] if turned else times, strict=True):
        bar[name] = time
    return row


NAMES = [
    "timestamp",
    "Timestamp",
    "date",
    "datetime",
    "Date Time",
    "ts",
    "t",
    "open_time",
    "closeTime",
    "Time",
    "EPOCH",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_usual_name_of_the_time_is_taken_as_the_time_and_said_once(name: str, tmp_path: Path) -> None:
    rows = [named(row, name, written="milliseconds") for row in dated_rows(3, seed=1, apart=60)]
    (surveyed, error) = survey(WindowFile(write_rows(tmp_path / "rows.jsonl", rows)))
    assert error is None
    assert extent(surveyed)["first_event"] == "2025-03-03T00:29:00+00:00"
    reading = surveyed.file.report
    assert list(reading.notices.lines()) == [f"3 of 3 rows have no time; {name} is used as the time of their bars"]
    assert f"bars.{name}" not in reading.ignored_fields


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("written", ["ISO", "nanoseconds"])
def test_bars_newest_first_are_refused_whatever_their_time_is_called(name: str, written: str) -> None:
    (fault,) = read([json.dumps(named(make_row(), name, turned=True, written=written)).encode()]).faults
    assert fault.startswith(f"rows.jsonl:1: bars must run oldest first, but {name} goes from ")


@pytest.mark.parametrize("times", [[29 - n for n in range(30)], [-n * 60.0 for n in range(30)]])
def test_numbers_that_run_backwards_throughout_are_refused_too(times: list[float]) -> None:
    row = make_row(place=False)
    for bar, time in zip(bars_of(row), times, strict=True):
        bar["ts"] = time
    assert read([json.dumps(row).encode()]).faults


@pytest.mark.parametrize(
    "values",
    [
        ["2025-03-03"] * 30,
        ["03/03/2025 10:00"] * 30,
        [0.5, -1.0, 2.0] * 10,
        [{"a": 1}] * 30,
        [True] * 30,
    ],
)
def test_a_field_that_is_only_called_like_a_time_is_none_and_the_order_is_said_to_be_a_guess(values: list[Any]) -> None:
    row = make_row(place=False)
    for bar, value in zip(bars_of(row), values, strict=True):
        bar["date"] = value
    reading = read([json.dumps(row).encode()])
    assert reading.faults == []
    untimely, guessed = reading.notices.lines()
    assert untimely.startswith("date is not used as the time of bars in 1 of 1 rows: ")
    assert guessed == ("1 of 1 rows have neither time nor bar_index, so their bars are assumed to be oldest first")
    assert reading.ignored_fields == {"bars.date": 1}


UNKNOWN_NAMES = [
    *("ts_event", "Gmt time", "window_start", "bar_timestamp", "timestamp_ns", "unix_ms", "@timestamp", "time (UTC)"),
    *("kline_open_time", "time_close", "start", "begin", "klineOpenTime", "k0"),
]


@pytest.mark.parametrize("name", UNKNOWN_NAMES)
@pytest.mark.parametrize("written", ["ISO", "ISO without a zone", "seconds", "milliseconds", "nanoseconds"])
def test_bars_newest_first_by_any_field_that_reads_as_a_time_are_refused(name: str, written: str) -> None:
    row = make_row()
    for place, bar in enumerate(bars_of(row)):
        bar["bar_index"] = place  # counted by whoever wrote the rows as they stood
    row = named(row, name, turned=True, written=written)
    (fault,) = read([json.dumps(row).encode()]).faults
    assert fault.startswith(f"rows.jsonl:1: bars must run oldest first, but {name} goes from ")
    forwards = named(make_row(), name, written=written)
    reading = read([json.dumps(forwards).encode()])
    assert (reading.faults, reading.ignored_fields) == ([], {f"bars.{name}": 1})


def test_times_of_ticks_run_backwards_too_if_their_name_says_what_they_are() -> None:
    row = make_row(place=False)
    for place, bar in enumerate(bars_of(row)):
        bar["ts_event"] = 1_741_010_400_000_000_000 - 7919 * place * place - place
    (fault,) = read([json.dumps(row).encode()]).faults
    assert fault.startswith("rows.jsonl:1: bars must run oldest first, but ts_event goes from 1741010400000000000 to ")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("open_interest", [1.5e9 - 1000 * n * n - n for n in range(30)]),  # falls, and is in the range of seconds
        ("cvd", [9e8 - 7 * n**3 - n for n in range(30)]),
        ("left", [29 - n for n in range(30)]),
        ("session", ["2025-03-03"] * 30),
        ("expires", ["2025-06-01", "2025-03-01"] * 15),
        ("note", [f"bar {n}" for n in range(30)]),
        ("seen", [True] * 30),
        ("some", [None, *(f"2025-03-03T10:{59 - n}:00Z" for n in range(29))]),
    ],
)
def test_a_field_that_is_no_time_orders_nothing(name: str, values: list[Any]) -> None:
    row = make_row(place=False)
    for bar, value in zip(bars_of(row), values, strict=True):
        bar[name] = value
    assert read([json.dumps(row).encode()]).faults == []


def test_the_time_of_bars_decides_over_other_dates() -> None:
    row = make_row()
    for place, bar in enumerate(bars_of(row)):
        bar["roll"] = f"2025-{12 - place // 3:02d}-{20 - place % 3 * 5:02d}"
    assert read([json.dumps(row).encode()]).faults == []


def test_the_time_comes_before_its_other_names() -> None:
    row = make_row()
    for n, bar in enumerate(bars_of(row)):
        bar["timestamp"] = 1000 - n
    window = make_window(row)
    assert (window.position.time_name, window.position.event) == ("time", "2025-03-03T10:29:00+00:00")


def test_each_unit_ends_where_no_other_begins() -> None:
    may_2033 = since(datetime(2033, 5, 18, tzinfo=UTC), 1)
    ranges = sorted((least, may_2033 * of_a_second) for least, of_a_second in UNITS.values())
    for (_, end), (start, _) in pairwise(ranges):
        assert end < start
    for unit, (least, of_a_second) in UNITS.items():
        for value in (least, may_2033 * of_a_second):
            assert parse_time(value) == (value * (10**9 // of_a_second), unit)


@pytest.mark.parametrize("value", [2401020930, 20240102093000, 638_396_658_000_000_000, 620_000_000_000_000_000])
def test_numbers_of_other_clocks_are_refused(value: int) -> None:
    """January 2024 in digits, with and without the century, and two dates in .NET's ticks."""
    with pytest.raises(ValueError, match="Convert other clocks to ISO 8601"):
        parse_time(value)


def test_a_single_row_is_answered_whatever_its_times(tmp_path: Path) -> None:
    for written in WRITTEN:
        window: Window = make_window(timed([make_row()], written)[0])
        assert window.position.event == "2025-03-03T10:29:00+00:00"


def test_times_of_a_day_as_plain_numbers_join_no_days(tmp_path: Path) -> None:
    """093000 each morning, five months apart: bar_index places the windows, and without it nothing does."""
    files = {"train": dated_rows(40, seed=1, apart=600), "val": dated_rows(12, seed=2, apart=600)}
    for days, rows in files.items():
        for n, row in enumerate(rows):
            for place, bar in enumerate(bars_of(row)):
                bar |= {"time": 93000 + 100 * place, "bar_index": (0 if days == "train" else 10**6) + 600 * n + place}
    paths: Any = {name: write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in files.items()}
    assert "shared bars" not in {leak["kind"] for leak in check_files(paths)["leaks"]}
    for row in (*files["train"], *files["val"]):
        for bar in bars_of(row):
            del bar["bar_index"]
    paths = {name: write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in files.items()}
    report = check_files(paths)
    assert "shared bars" not in {leak["kind"] for leak in report["leaks"]}
    assert any("times are plain numbers that restart" in what for what in report["unchecked"])
