"""Times of bars: formats, order of day and month, daylight saving, opens and closes.

python -m pytest tests/bars/test_clock.py
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from ctxtrain.bars.file_bars import ReadOptions
from ctxtrain.bars.series import Market, read_market
from ctxtrain.errors import ConfigError, DataError

ATHENS = ZoneInfo("Europe/Athens")  # 2024: forward on 31 March at 01:00 UTC, back on 27 October at 01:00 UTC
LORD_HOWE = ZoneInfo("Australia/Lord_Howe")  # changes by half an hour


def write(path: Path, times: Sequence[str]) -> Path:
    """A bar at each time, the price of which is its number."""
    lines = ["time;open;high;low;close", *(f"{time};{n};{n};{n};{n}" for n, time in enumerate(times, start=1))]
    path.write_text("\n".join(lines))
    return path


def read(path: Path, **options: Any) -> Market:
    return read_market([path], ReadOptions(**options))


def opens(market: Market) -> list[datetime]:
    return [datetime.fromtimestamp(stamp / 1e9, UTC) for stamp in market.series[0].opens_T.tolist()]


def minutes(first: datetime, count: int, step: int) -> list[datetime]:
    return [first + timedelta(minutes=step * n) for n in range(count)]


@pytest.mark.parametrize(
    "form",
    [
        "%Y-%m-%dT%H:%M:%SZ",
        "%Y-%m-%d %H:%M:%S.000+00:00",
        "%Y-%m-%d %H:%M",
        "%Y.%m.%d %H:%M:%S",
        "%Y/%m/%d %H:%M",
        "%Y%m%d %H%M%S",
        "%Y%m%d  %H:%M:%S",
        "%Y%m%d-%H:%M:%S",
        "%Y%m%d %H:%M:%S UTC",
        "%Y%m%d %H:%M:%S Etc/UTC",
        "%d.%m.%Y %H:%M:%S.000 GMT+0000",
        "%Y%m%d%H%M%S",
        "%Y%m%d%H%M",
        "%d.%m.%Y %H:%M:%S",
        "%m/%d/%Y %H:%M",
        "%m/%d/%y %I:%M %p",
        "%Y-%m-%d %I:%M:%S %p",
        "%s",
        "%s000",
        "%s000000",
        "%s000000000",
    ],
)
def test_a_time_is_read_in_every_usual_form(form: str, tmp_path: Path) -> None:
    expected = minutes(datetime(2024, 1, 25, 11, 50, tzinfo=UTC), 20, 5)
    texts = [form.replace("%s", str(round(when.timestamp()))) for when in expected]
    texts = [when.strftime(text) for when, text in zip(expected, texts, strict=True)]
    assert opens(read(write(tmp_path / "a.csv", texts))) == expected


AUTUMN = [(ATHENS, datetime(2024, 10, 26, 22, tzinfo=UTC), step) for step in (1, 5, 15, 30, 60)]
AUTUMN += [(LORD_HOWE, datetime(2024, 4, 6, 12, tzinfo=UTC), step) for step in (1, 5, 15, 30)]


@pytest.mark.parametrize(("zone", "first", "step"), AUTUMN)
@pytest.mark.parametrize("newest_first", [False, True])
def test_the_hour_that_occurs_twice_is_resolved_by_order(
    zone: ZoneInfo, first: datetime, step: int, newest_first: bool, tmp_path: Path
) -> None:
    expected = minutes(first, 600 // step, step)
    texts = [f"{when.astimezone(zone):%Y-%m-%d %H:%M:%S}" for when in expected]
    path = write(tmp_path / "a.csv", texts[::-1] if newest_first else texts)
    assert opens(read(path, time_zone=zone.key)) == expected


@pytest.mark.parametrize("is_second", [False, True])
def test_an_hour_that_the_file_has_once_leaves_no_gap_to_its_neighbour(is_second: bool, tmp_path: Path) -> None:
    all_bars = minutes(datetime(2024, 10, 26, 22, tzinfo=UTC), 120, 5)
    halt = range(18, 36) if is_second else range(36, 54)  # 23:30 to 01:00 UTC, or 01:00 to 02:30
    expected = [when for n, when in enumerate(all_bars) if n not in halt]
    texts = [f"{when.astimezone(ATHENS):%Y-%m-%d %H:%M}" for when in expected]
    assert opens(read(write(tmp_path / "a.csv", texts), time_zone="Europe/Athens")) == expected


def test_an_hour_that_the_file_has_once_without_a_gap_is_taken_as_the_first_and_said(tmp_path: Path) -> None:
    texts = [f"{when:%Y-%m-%d %H:%M}" for when in minutes(datetime(2024, 10, 27, tzinfo=UTC), 100, 5)]
    market = read(write(tmp_path / "a.csv", texts), time_zone="Europe/Athens")
    assert opens(market)[36] == datetime(2024, 10, 27, 0, tzinfo=UTC)
    assert any("12 of them in an hour that fits both, taken as the first" in line for line in market.notes)


def test_a_bar_in_the_hour_that_spring_leaves_out_is_a_fault_and_other_bars_are_not(tmp_path: Path) -> None:
    expected = minutes(datetime(2024, 3, 31, 0, tzinfo=UTC), 36, 5)
    texts = [f"{when.astimezone(ATHENS):%Y-%m-%d %H:%M}" for when in expected]
    assert opens(read(write(tmp_path / "a.csv", texts), time_zone="Europe/Athens")) == expected
    path = write(tmp_path / "a.csv", [*texts[:12], "2024-03-31 03:30", *texts[12:]])
    with pytest.raises(DataError, match=r"a\.csv:14: a time must exist in Europe/Athens, but daylight saving leaves"):
        read(path, time_zone="Europe/Athens")


@pytest.mark.parametrize("step", [1, 5, 30])
def test_times_that_go_back_by_an_hour_name_the_option(step: int, tmp_path: Path) -> None:
    bars = minutes(datetime(2024, 10, 26, 22, tzinfo=UTC), 600 // step, step)
    path = write(tmp_path / "a.csv", [f"{when.astimezone(ATHENS):%Y-%m-%d %H:%M}" for when in bars])
    with pytest.raises(
        DataError, match=r"must not go back, but they go from 2024-10-27T03:.* Give the zone with --time-z"
    ):
        read(path)


def test_two_bars_of_an_hour_in_autumn_name_the_option(tmp_path: Path) -> None:
    bars = minutes(datetime(2024, 10, 26, 22, tzinfo=UTC), 10, 60)
    path = write(tmp_path / "a.csv", [f"{when.astimezone(ATHENS):%Y-%m-%d %H:%M}" for when in bars])
    with pytest.raises(DataError, match=r"must have one bar at 2024-10-27T03:00.* Or give the zone of the times with"):
        read(path)


def test_day_and_month_are_told_from_any_date_above_twelve_or_from_the_order(tmp_path: Path) -> None:
    days = [datetime(2024, 1, 1, tzinfo=UTC) + timedelta(days=n) for n in range(11)]
    for form in ("%d.%m.%Y %H:%M", "%m/%d/%Y %H:%M"):  # no day above twelve; the other reading goes by months
        texts = [day.strftime(form) for day in [*days, datetime(2024, 2, 1, tzinfo=UTC)]]
        assert opens(read(write(tmp_path / "a.csv", texts)))[1] == days[1], form


def test_dates_that_can_be_both_are_refused_with_the_option(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", ["01/02/2024 10:00", "01/02/2024 10:01", "01/02/2024 10:02"])
    with pytest.raises(DataError, match=r"whether the day or the month is first, .* Add --dates dmy or --dates mdy"):
        read(path)
    assert opens(read(path, dates="dmy"))[0] == datetime(2024, 2, 1, 10, tzinfo=UTC)
    assert opens(read(path, dates="mdy"))[0] == datetime(2024, 1, 2, 10, tzinfo=UTC)


def test_daily_bars_are_days(tmp_path: Path) -> None:
    days = [datetime(2024, 1, 1, tzinfo=UTC) + timedelta(days=n) for n in range(5)]
    market = read(write(tmp_path / "a.csv", [f"{day:%Y%m%d}" for day in days]))
    assert opens(market) == days
    assert market.timeframe == "D1"


def test_a_session_that_daylight_saving_lengthens_is_no_gap(tmp_path: Path) -> None:
    zone = ZoneInfo("America/New_York")
    opens_at = [datetime(2024, 10, 28, 18, tzinfo=zone) + timedelta(days=n) for n in range(12)]
    market = read(write(tmp_path / "a.csv", [when.isoformat() for when in opens_at]))
    assert (market.timeframe, market.counts["gaps"], market.counts["bars_off_the_grid"]) == ("D1", 0, 1)


def test_stamps_at_the_close_become_opens(tmp_path: Path) -> None:
    expected = minutes(datetime(2024, 1, 2, 9, tzinfo=UTC), 5, 5)
    closes = write(tmp_path / "a.csv", [f"{when + timedelta(minutes=5):%Y-%m-%dT%H:%MZ}" for when in expected])
    assert opens(read(closes, stamp="close")) == expected
    assert opens(read(closes))[0] == expected[1]
    closes.write_text(closes.read_text().replace("time;", "close_time;"))
    assert opens(read(closes)) == expected


@pytest.mark.parametrize(
    ("times", "options", "error", "words"),
    [
        (
            ["2024-01-02 09:00Z", "2024-01-02 09:01"],
            {},
            DataError,
            "a.csv:3: either all times of a file have a zone or",
        ),
        (["1704187800", "1704187860000"], {}, DataError, "times must have one unit in a file, got 1704187800 (seconds"),
        (["12", "13"], {}, DataError, "a.csv:2: times must have one unit in a file, got 12 (plain numbers"),
        (["noon", "one"], {}, DataError, 'a.csv:2: time must be a known date format, got "noon"'),
        (["2024-01-02 24:00"], {}, DataError, "a.csv:2: time must be a date in one format"),
        (["2024-01-02 09:00 EDT"], {}, ConfigError, "a time zone must be a name of the tz database, got 'EDT'"),
        (["2024-01-02 09:00"], {"time_zone": "Athens"}, ConfigError, "tz database, got 'Athens'. Use --time-zone with"),
        (
            ["2024-01-02 09:00Z"],
            {"time_zone": "UTC"},
            ConfigError,
            "the times of this file have one. Leave --time-zone",
        ),
        (["2024-01-02 09:00Z"], {}, DataError, "one bar has no length. Give it with --bar-length, such as 5m"),
    ],
)
def test_refusals_name_the_rule_the_value_and_the_remedy(
    times: list[str], options: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as refused:
        read(write(tmp_path / "a.csv", times), **options)
    assert words in str(refused.value)


BERLIN = ZoneInfo("Europe/Berlin")  # 2024: back on 27 October at 01:00 UTC
LONG_BARS = [
    (BERLIN, datetime(2024, 10, 20, tzinfo=UTC), 240),  # 02:00 and then 05:00 on the day of the change
    (BERLIN, datetime(2024, 10, 20, tzinfo=UTC), 480),
    (BERLIN, datetime(2024, 10, 20, tzinfo=UTC), 1440),
    (LORD_HOWE, datetime(2024, 4, 1, 0, 30, tzinfo=UTC), 120),
    (LORD_HOWE, datetime(2024, 4, 1, 1, 0, tzinfo=UTC), 120),
]


@pytest.mark.parametrize(("zone", "first", "step"), LONG_BARS)
def test_long_bars_on_the_grid_of_utc_keep_their_grid_in_autumn(
    zone: ZoneInfo, first: datetime, step: int, tmp_path: Path
) -> None:
    expected = minutes(first, 90, step)[: 14 * 1440 // step]
    texts = [f"{when.astimezone(zone):%Y-%m-%d %H:%M:%S}" for when in expected]
    market = read(write(tmp_path / "a.csv", texts), time_zone=zone.key)
    assert opens(market) == expected
    assert not any("taken as the first" in line for line in market.notes)


def test_long_bars_that_fit_both_hours_of_autumn_are_counted_as_guessed(tmp_path: Path) -> None:
    texts = [f"2024-10-{day} {hour:02}:00:00" for day in (26, 27, 28) for hour in range(2, 24, 4)]  # a local grid
    market = read(write(tmp_path / "a.csv", texts), time_zone="Europe/Berlin")
    assert opens(market)[6] == datetime(2024, 10, 27, 0, tzinfo=UTC)
    assert any("1 of them in an hour that fits both, taken as the first" in line for line in market.notes)


@pytest.mark.parametrize("step", [30, 60])
@pytest.mark.parametrize("copies", ["lines", "file", "lines of the file twice"])
def test_equal_lines_in_autumn_are_duplicates(step: int, copies: str, tmp_path: Path) -> None:
    expected = minutes(datetime(2024, 10, 26, 18, tzinfo=UTC), 24, step)
    texts = [f"{when.astimezone(BERLIN):%Y-%m-%d %H:%M:%S}" for when in expected]
    head, *lines = write(tmp_path / "a.csv", texts).read_text().split("\n")
    lines = lines * 2 if copies == "file" else [line for line in lines for _ in range(2)]
    lines = lines * 2 if copies == "lines of the file twice" else lines
    (tmp_path / "a.csv").write_text("\n".join([head, *lines]))
    market = read(tmp_path / "a.csv", time_zone="Europe/Berlin")
    assert opens(market) == expected
    assert market.counts["duplicates"] == len(lines) - len(expected)
