"""Bars as brokers and programs spell them: times, prices, volumes, headers, and options that do not fit.

python -m pytest tests/bars/test_spellings_of_bars.py
"""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ctxtrain.bars.options import parse_read_options
from ctxtrain.bars.series import Market, read_market
from ctxtrain.bars.windows import cut_windows
from ctxtrain.errors import ConfigError
from tests.bars.test_faults import bars, read, refusal
from tests.bars.test_windows_of_bars import options

START = datetime(2024, 2, 27, 9, tzinfo=UTC)


def write(path: Path, head: str, line: str, count: int = 10, **form: str) -> Path:
    """Daily bars (hourly with `hours`); `{t}` of `line` is the time in the form of `form['t']`, `{n}` its number."""
    step = timedelta(hours=1) if form.get("step") == "hour" else timedelta(days=1)
    lines = [line.format(t=(START + step * n).strftime(form.get("t", "%Y-%m-%d")), n=n) for n in range(count)]
    path.write_text("\n".join([*([head] if head else []), *lines]))
    return path


def first_open(market: Market) -> datetime:
    return datetime.fromtimestamp(int(market.series[0].opens_T[0]) / 1e9, UTC)


@pytest.mark.parametrize(
    ("form", "is_day"),
    [
        ("%d-%b-%Y", True),
        ('"%b %d, %Y"', True),
        ('"%B %d, %Y"', True),
        ("%d %b %Y %H:%M", False),
        ('"%b %d, %Y %I:%M %p"', False),
        ("%Y-%m-%d %H:%M:%S+00", False),
        ("%Y-%m-%dT%H:%M:%S-00", False),
    ],
)
def test_times_with_names_of_months_or_short_offsets_are_read(form: str, is_day: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "GC.csv", "time,open,high,low,close", "{t},1,1,1,1", t=form)
    assert first_open(read(path)) == (START.replace(hour=0) if is_day else START)


@pytest.mark.parametrize("price", ["$1999.87", "1999.87 €", '"$1,999.87"', "£ 1999.87"])
def test_the_sign_of_a_currency_is_no_part_of_a_price(price: str, tmp_path: Path) -> None:
    path = write(tmp_path / "GC.csv", "time,open,high,low,close", f"{{t}},{','.join([price] * 4)}")
    market = read(path)
    assert market.series[0].columns["close"][0] == 1999.87
    assert any("signs of a currency removed from open, high, low, close" in line for line in market.notes)


@pytest.mark.parametrize(("cell", "volume"), [("180K", 180_000), ("1.15M", 1_150_000), ("2.5b", 2_500_000_000)])
def test_volumes_in_thousands_and_millions_are_numbers(cell: str, volume: float, tmp_path: Path) -> None:
    market = read(write(tmp_path / "GC.csv", "time,open,high,low,close,Vol.", f"{{t}},1,1,1,1,{cell}"))
    assert market.series[0].columns["volume"].tolist() == [volume] * 10
    assert any("volume: 10 cells with K, M or B are thousands, millions or billions" in line for line in market.notes)


@pytest.mark.parametrize("cell", ["-1", "-1.0"])
def test_a_volume_of_minus_one_on_all_bars_is_not_given(cell: str, tmp_path: Path) -> None:
    market = read(write(tmp_path / "EUR.csv", "time,open,high,low,close,volume", f"{{t}},1,1,1,1,{cell}"))
    assert "volume" not in market.series[0].columns
    assert any("volume is -1 on all bars, as Interactive Brokers writes it" in line for line in market.notes)
    mixed = (tmp_path / "EUR.csv").read_text().replace(f"1,{cell}", "1,5", 1)
    (tmp_path / "EUR.csv").write_text(mixed)
    assert "EUR.csv:3: volume must be from 0" in refusal(tmp_path / "EUR.csv")


@pytest.mark.parametrize(
    "head",
    [
        "Price,Close,High,Low,Open,Volume\nTicker,AAPL,AAPL,AAPL,AAPL,AAPL\nDate,,,,,",
        "Price,Open,High,Low,Close,Volume\nDate,,,,,",
    ],
)
def test_the_header_lines_of_yfinance_are_no_bars(head: str, tmp_path: Path) -> None:
    market = read(write(tmp_path / "AAPL.csv", head, "{t},1,1,1,1,{n}"))
    assert (first_open(market), market.counts["bars"]) == (START.replace(hour=0), 10)
    assert any("lines of yfinance below them skipped" in line for line in market.notes)
    (tmp_path / "AAPL.csv").write_text((tmp_path / "AAPL.csv").read_text().replace("AAPL,AAPL", "AAPL,MSFT"))
    if "Ticker" in head:
        assert "a file must have one market, got columns of" in refusal(tmp_path / "AAPL.csv")


@pytest.mark.parametrize("footer", ['"Downloaded from Barchart.com as of 01-02-2024"', "End of data"])
def test_a_last_line_that_is_no_bar_is_named(footer: str, tmp_path: Path) -> None:
    path = write(tmp_path / "GC.csv", "time,open,high,low,close", "{t},1,1,1,1")
    path.write_text(f"{path.read_text()}\n{footer}\n")
    assert "GC.csv:12: must have 5 columns as the other lines have, got 1. Delete this line" in refusal(path)


@pytest.mark.parametrize(
    ("head", "line", "form"),
    [
        ("date,hour,open,high,low,close", "{t},0,1,1,1,1", "%Y-%m-%dT%H:%M:%SZ"),
        ("time,date,open,high,low,close", "{t},1,1,1,1", "%s,%Y-%m-%dT%H:%M:%SZ"),
        ("date,time,open,high,low,close", "{t},1,1,1,1", "%Y-%m-%d,%Y-%m-%d %H:%M"),
        ("date,time,open,high,low,close", "{t},1,1,1,1", "%Y-%m-%d 00:00:00,%H:%M"),
        ("date,hour,open,high,low,close", "{t},1,1,1,1", "%Y-%m-%d,%-H"),
    ],
)
def test_a_complete_time_is_not_joined_with_another_column(head: str, line: str, form: str, tmp_path: Path) -> None:
    form = form.replace("%s", "1709024400") if "%s" in form else form
    path = write(tmp_path / "GC.csv", head, line, t=form, step="hour")
    if form.startswith("1709"):  # the number of seconds of each bar
        lines = path.read_text().split("\n")
        lines[1:] = [text.replace("1709024400", str(1_709_024_400 + 3600 * n), 1) for n, text in enumerate(lines[1:])]
        path.write_text("\n".join(lines))
    market = read(path)
    assert (first_open(market), market.timeframe) == (START, "H1")


@pytest.mark.parametrize("text", [True, False])
def test_an_average_price_in_arrays_is_not_taken_for_the_volume(text: bool, tmp_path: Path) -> None:
    rows: list[list[Any]] = [
        [1_709_024_400 + 60 * n, 10.0, 12.0, 9.0, 11.0, 10.5 + n / 100, 300 + n, 7] for n in range(20)
    ]
    rows = [[row[0], *map(str, row[1:7]), row[7]] for row in rows] if text else rows
    (tmp_path / "XBT.json").write_text(json.dumps(rows))
    market = read(tmp_path / "XBT.json")
    assert market.series[0].columns["volume"].tolist() == [300 + n for n in range(20)]
    assert any("column 6 lies within each bar: an average price, not the volume" in line for line in market.notes)


TICKS = "<DATE>,<OPEN>,<HIGH>,<LOW>,<CLOSE>,<TICKVOL>,<VOL>"


@pytest.mark.parametrize("traded", ["0", "0.0"])
def test_the_volume_of_all_files_is_of_one_kind(traded: str, tmp_path: Path) -> None:
    one = write(tmp_path / "GC_2023.csv", TICKS, f"{{t}},1,1,1,1,50,{traded}")
    two = write(tmp_path / "GC_2024.csv", TICKS, "{t},1,1,1,1,50,7", t="%Y-%m-%d")
    assert "the volume of all files must be of one kind, got ticks in GC_2023.csv" in refusal(one, two)
    (series,) = read(one, two, columns={"volume": "<TICKVOL>"}).series
    assert set(series.columns["volume"]) == {50}


@pytest.mark.parametrize("cell", ["0,0", "0,00"])
def test_a_traded_volume_of_0_with_a_decimal_comma_gives_way_to_ticks(cell: str, tmp_path: Path) -> None:
    head = "time;open;high;low;close;tick_volume;real_volume"
    market = read(write(tmp_path / "GC.csv", head, f"{{t}};1,5;1,5;1,5;1,5;50;{cell}"))
    assert set(market.series[0].columns["volume"]) == {50}


def parsed(**given: Any) -> Any:
    names = ("symbol", "time_zone", "stamp", "bar_length", "columns", "decimal", "separator", "dates", "fields")
    return parse_read_options(**dict.fromkeys(names) | given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"higher": 10**9}, "higher must be from 2 to"),
        ({"events": "9" * 5000}, "events must be every, a number of bars from 1 to"),
        ({"events": "1" + "0" * 20}, "events must be every, a number of bars from 1 to"),
        ({"max_gap": 10**30}, "max-gap must be from 0 to"),
        ({"cost": "9" * 400}, "cost must be a number of 0 or more, up to 1e+15"),
        ({"stop": "9" * 400 + "atr"}, "stop must be a number above 0, up to 1e+15"),
        ({"profit": "9" * 5000 + "%"}, "profit must be a number above 0, up to 1e+15"),
    ],
)
def test_options_have_upper_bounds(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        options(**given)
    assert words in str(refused.value)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"bar_length": "999999w"}, "bar-length must be a number with s, m, h, d or w, of at most 366d"),
        ({"symbol": ""}, "symbol must not be empty. Leave --symbol out"),
        ({"time_zone": ""}, "time-zone must not be empty. Leave --time-zone out"),
        ({"columns": "open=2,open=3"}, "columns must name each field once, got open twice"),
    ],
)
def test_options_that_say_nothing_or_two_things_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parsed(**given)
    assert words in str(refused.value)


def test_a_cost_beyond_all_stops_is_refused(tmp_path: Path) -> None:
    lines = [f"{1_709_024_400 + 60 * n},10,{12 + n % 3},9,{10 + n % 2}" for n in range(300)]
    (tmp_path / "GC.csv").write_text("\n".join(["time,open,high,low,close", *lines]))
    with pytest.raises(ConfigError, match="cost must be at most 1,000,000,000 times the stop, got 100000000000"):
        cut_windows(read(tmp_path / "GC.csv"), options(bars=20, cost="1" + "0" * 11))


@pytest.mark.parametrize(("length", "usual"), [("5m", "1 minute"), ("40s", "1 minute"), ("1d", "1 minute")])
def test_a_bar_length_that_contradicts_the_steps_is_refused(length: str, usual: str, tmp_path: Path) -> None:
    path = bars(tmp_path / "GC.csv")
    said = refusal(path, bar_length=parsed(bar_length=length).bar_length)
    assert f"but most steps are {usual}. Leave --bar-length out" in said


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"separator": ";"}, "--separator has no effect on a JSON array of objects"),
        ({"decimal": ","}, "--decimal has no effect: the prices are numbers, not text"),
        ({"dates": "dmy"}, "--dates has no effect: the times show day and month"),
        ({"columns": {"open": "close"}}, "read from the same column: open and close"),
    ],
)
def test_options_without_effect_are_said(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    rows = [{"time": f"2024-01-02T09:3{n}:00Z", "open": 1, "high": 1, "low": 1, "close": 1} for n in range(5)]
    (tmp_path / "GC.json").write_text(json.dumps(rows))
    assert any(words in line for line in read(tmp_path / "GC.json", **given).notes)


@pytest.mark.parametrize("zone", ["US/Eastern", "Europe/Athens"])
def test_a_zone_beside_times_that_name_theirs_is_refused(zone: str, tmp_path: Path) -> None:
    path = write(tmp_path / "GC.csv", "time,open,high,low,close", "{t},1,1,1,1", t=f"%Y%m%d %H:%M:%S {zone}")
    with pytest.raises(ConfigError, match=r"but the times of this file have one\. Leave --time-zone out"):
        read_market([path], parsed(time_zone="Europe/Athens"))
