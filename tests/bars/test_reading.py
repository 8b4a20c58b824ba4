"""One market, as each program exports it, is the same series of bars; what cannot be read says why.

python -m pytest tests/bars/test_reading.py
"""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from ctxtrain.bars.file_bars import ReadOptions
from ctxtrain.bars.series import Market, read_market
from ctxtrain.bars.structure import Bars
from ctxtrain.bars.symbol_name import symbol_of_file
from ctxtrain.errors import ConfigError, DataError
from tests.bars import exporters

PRICES = ("open", "high", "low", "close", "volume")
Write = Callable[[Path, Bars], Path]


def utf_16(folder: Path, market: Bars) -> Path:
    return exporters.metatrader(folder, market, "utf-16")


def spot_before_2025(folder: Path, market: Bars) -> Path:
    return exporters.binance(folder, market, 1000)


def futures(folder: Path, market: Bars) -> Path:
    heads = "open_time,open,high,low,close,volume,close_time,quote_volume,count,taker_buy_volume,taker_buy_quote_volume"
    return exporters.binance(folder, market, 1000, f"{heads},ignore")


def without_zone(folder: Path, market: Bars) -> Path:
    return exporters.interactive_brokers(folder, market, named=False)


EXPORTS: list[tuple[Write, dict[str, Any]]] = [
    (exporters.freqtrade_feather, {}),
    (exporters.freqtrade_parquet, {}),
    (exporters.freqtrade_json, {}),
    (exporters.tradingview, {}),
    (exporters.tradingview_epoch, {}),
    (exporters.metatrader, {"time_zone": "Europe/Athens"}),
    (utf_16, {"time_zone": "Europe/Athens"}),
    (exporters.binance, {}),
    (spot_before_2025, {}),
    (futures, {}),
    (exporters.binance_api, {}),
    (exporters.ninjatrader, {}),
    (exporters.interactive_brokers, {}),
    (without_zone, {"time_zone": "US/Eastern"}),
    (exporters.excel, {"columns": exporters.EXCEL_COLUMNS}),
    (exporters.nested_export, {}),
    (exporters.wrapped_json, {}),
    (exporters.columnar_json, {}),
    (exporters.german_csv, {}),
    (exporters.spanish_csv, {}),
]


@pytest.fixture(scope="module")
def market() -> Bars:
    return exporters.make_market()


def read(path: Path, **options: Any) -> Market:
    return read_market([path], ReadOptions(**options))


def faults_of(text: str, folder: Path, name: str = "GC.csv", **options: Any) -> str:
    path = folder / name
    path.write_text(text)
    with pytest.raises((DataError, ConfigError)) as refused:
        read(path, **options)
    return str(refused.value).replace(str(folder), "")


@pytest.mark.parametrize(("write", "options"), EXPORTS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_program_exports_the_same_bars(
    write: Write, options: dict[str, Any], market: Bars, tmp_path: Path
) -> None:
    found = read(write(tmp_path, market), **options)
    (series,) = found.series
    assert found.timeframe == "M5"
    expected = [round(when.timestamp()) * 10**9 for when in market["when"]]
    assert series.opens_T.tolist() == expected
    for name in PRICES:
        assert series.columns[name].tolist() == market[name].tolist(), name
    assert (found.counts["gaps"], found.counts["bars_missing_in_gaps"], found.counts["longest_gap_in_bars"]) == (
        2,
        43,
        37,
    )


def test_taker_volume_is_that_of_buyers_and_the_rest_that_of_sellers(market: Bars, tmp_path: Path) -> None:
    (series,) = read(exporters.binance(tmp_path, market)).series
    assert series.columns["buy_vol"].tolist() == market["buy_vol"].tolist()
    assert (series.columns["buy_vol"] + series.columns["sell_vol"] == market["volume"]).all()


def test_a_nested_export_gives_its_flags_and_the_direction_of_the_higher_timeframe(
    market: Bars, tmp_path: Path
) -> None:
    found = read(exporters.nested_export(tmp_path, market))
    (series,) = found.series
    numbers = np.arange(len(series))
    assert series.symbol == "GC 12-24"
    assert series.columns["delta"].tolist() == (numbers % 7 - 3).tolist()
    assert series.columns["htf_dir"].tolist() == (numbers % 3 - 1).tolist()
    assert (series.columns["ext_dir"] == -1).all()
    assert series.columns["ext_bos_up"].tolist() == (numbers % 50 == 0).tolist()
    assert series.columns["fvg_up"].tolist() == (numbers % 3 == 0).tolist()
    assert (series.columns["fvg_up"] + series.columns["fvg_down"] == 1).all()
    assert "mtf_context.m5.volume_stats.total_volume" in found.sources[0]["unread_columns"]


def test_what_was_told_is_stated(market: Bars, tmp_path: Path) -> None:
    path = exporters.excel(tmp_path, market)
    notes = "\n".join(read(path, columns=exporters.EXCEL_COLUMNS).notes).replace(f"{path}: ", "")
    assert notes.splitlines() == [
        "text separated by semicolons, with column names, Windows-1252, decimal comma",
        "columns: time = Tid, open = Öppning, high = Högst, low = Lägst, close = Senast, volume = Volym",
        "symbol Gold, from the name of the file",
        "times: text such as '04.11.2024 04:55', day first, without a zone, taken as UTC; --time-zone names another",
        "bars run newest first; sorted",
        "stamps: open of the bar, as most programs write them; --stamp close changes it",
        "bars: 5 minutes, the most common step",
    ]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_packed_files_are_read_by_their_content(suffix: str, market: Bars, tmp_path: Path) -> None:
    path = exporters.tradingview(tmp_path, market)
    packed = tmp_path / "GC.csv"  # without an ending that says so
    if suffix == "gz":
        packed.write_bytes(gzip.compress(path.read_bytes()))
    else:
        with pa.CompressedOutputStream(str(packed), "zstd") as stream:
            stream.write(path.read_bytes())
    assert read(packed).counts == read(path).counts


def test_monthly_files_are_joined_and_equal_bars_of_two_files_counted(market: Bars, tmp_path: Path) -> None:
    head = {name: values[:1000] for name, values in market.items()}
    tail = {name: values[990:] for name, values in market.items()}
    (tmp_path / "old").mkdir()
    # Milliseconds before 2025, microseconds since.
    paths = [exporters.binance(tmp_path, tail), exporters.binance(tmp_path / "old", head, 1000)]
    found = read_market(paths, ReadOptions())
    assert len(found.series[0]) == len(market["open"])
    assert found.counts["duplicates"] == 10


def test_a_column_of_symbols_gives_a_series_of_each(tmp_path: Path) -> None:
    lines = ["symbol,time,open,high,low,close"]
    for minute in range(3):
        lines += [f"{name},2024-01-02T09:3{minute}:00Z,{n},{n},{n},{n}" for n, name in enumerate(("ES", "NQ"), start=1)]
    (tmp_path / "two.csv").write_text("\n".join(lines))
    found = read(tmp_path / "two.csv")
    assert [(one.symbol, one.columns["open"].tolist()) for one in found.series] == [
        ("ES", [1, 1, 1]),
        ("NQ", [2, 2, 2]),
    ]


@pytest.mark.parametrize(
    ("name", "symbol"),
    [
        ("BTC_USDT-5m.feather", "BTC_USDT"),
        ("ETH_USDT_USDT-1h-futures.feather", "ETH_USDT_USDT"),
        ("BTCUSDT-1m-2024-01.csv.gz", "BTCUSDT"),
        ("EURUSD_M1_202401020000_202401312359.csv", "EURUSD"),
        ("EURUSD_Daily_202401020000.csv", "EURUSD_Daily"),
        ("BINANCE_BTCUSDT, 60.csv", "BINANCE_BTCUSDT"),
        ("OANDA_XAUUSD, 1D_a1b2c.csv", "OANDA_XAUUSD"),
        ("GC 12-25.Last.txt", "GC 12-25"),
        ("AAPL.csv", "AAPL"),
    ],
)
def test_the_symbol_is_told_from_the_name_of_the_file(name: str, symbol: str) -> None:
    assert symbol_of_file(Path("data") / name) == symbol


def bars_of(*cells: str, separator: str = ";") -> str:
    """Ten bars of one minute, whose prices have the given texts."""
    lines = [separator.join(("time", "open", "high", "low", "close"))]
    lines += [separator.join([f"2024-01-02 09:3{n}", *(cells[min(n, len(cells) - 1)],) * 4]) for n in range(10)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("cells", "value"),
    [
        (("1.234,56",), 1234.56),
        (("1,234.56",), 1234.56),
        (("4135,7",), 4135.7),
        (("1,234", "1,2345"), 1.234),  # the second is no group of three digits
        (("1,234,567",), 1234567.0),
        (("1.234",), 1.234),
        (("1 234,5",), 1234.5),
        (("1'234.5",), 1234.5),
    ],
)
def test_the_decimal_mark_is_told_from_all_prices(cells: tuple[str, ...], value: float, tmp_path: Path) -> None:
    (tmp_path / "GC.csv").write_text(bars_of(*cells))
    assert read(tmp_path / "GC.csv").series[0].columns["open"][0] == value


def test_a_comma_that_can_be_both_is_refused_with_the_option(tmp_path: Path) -> None:
    message = faults_of(bars_of("1,234"), tmp_path)
    assert message == (
        '/GC.csv: prices must show whether a comma is a decimal comma or separates thousands, got "1,234". '
        "Add --decimal , or --decimal ."
    )
    assert read(tmp_path / "GC.csv", decimal=",").series[0].columns["open"][0] == 1.234
    assert read(tmp_path / "GC.csv", decimal=".").series[0].columns["open"][0] == 1234


COMMAS = bars_of("1.5", separator=",")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (COMMAS + "\n2024-01-02 09:40,1,2", "/GC.csv:12: must have 5 columns as the other lines have, got 3"),
        (COMMAS + "\n2024-01-02 09:40,1,x,1,1", '/GC.csv:12: high must be a number, got "x"'),
        (COMMAS + "\n2024-01-02 09:40,1,,1,1", "/GC.csv:12: a bar must have four prices, got none for high"),
        (COMMAS + "\n2024-01-02 09:40,1,2,3,1", "/GC.csv:12: a bar must have low ≤ open, close ≤ high, got open 1,"),
        (COMMAS + "\n2024-01-02 09:39,1,1,1,1", "/GC.csv:12: GC must have one bar at 2024-01-02T09:39:00+00:00, but"),
        (COMMAS + "\n2024-02-30 09:39,1,1,1,1", '/GC.csv:12: time must be a date in one format, got "2024-02-30'),
        (COMMAS + "\n,1,1,1,1", "/GC.csv:12: a bar must have a time, got none"),
        (COMMAS.replace("open", "one"), "no column is known as open; the columns are time, one, high, low, close"),
        ("a,b\n1,2", "a line must have at least 5 columns"),
        ("", "/GC.csv: the file has no bars"),
        ("# a\n# b\n", "/GC.csv: the file has no bars"),
        ("sep=;\n", "/GC.csv: the file has no bars"),
        (COMMAS.replace("2024-01-02 09:33", "33-Jan-2024"), 'got "33-Jan-2024'),
        ("time,open,high,low,close\n", "/GC.csv: the file has no bars below the names"),
        ("[[1704187800000,1,1,1,1],[1704187860000,1,1,1]]", "element 2 must have 5 values as the first has, got 4"),
        ('{"time": 1}\n{"time": }', "/GC.csv:2:10: not valid JSON"),
        ("PK\x03\x04", "got a zip file (an .xlsx is one too). Unpack it, or save the sheet as CSV"),
    ],
)  # fmt: skip
def test_faults_have_the_line_the_rule_and_the_remedy(text: str, words: str, tmp_path: Path) -> None:
    assert words in faults_of(text, tmp_path)


def test_the_faults_of_all_files_come_together(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(COMMAS + "\n1,2")
    with pytest.raises(DataError) as refused:
        read_market([tmp_path / "a.csv", tmp_path / "none.csv"], ReadOptions())
    assert [fault.replace(f"{tmp_path}/", "")[:22] for fault in refused.value.faults] == [
        "a.csv:12: must have 5 ",
        "none.csv: no such file",
    ]


def test_rows_without_prices_and_comments_are_counted(tmp_path: Path) -> None:
    (tmp_path / "GC.csv").write_text("# made by hand\n" + COMMAS + "\n\n2024-01-02 09:40,,,,\n")
    found = read(tmp_path / "GC.csv")
    assert (found.counts["bars"], found.counts["rows_without_prices"]) == (10, 1)
    assert any("rows without prices, left out: 1" in line for line in found.notes)
    assert any("lines with # skipped: 1" in line for line in found.notes)


def test_lines_above_the_names_are_skipped_and_said(tmp_path: Path) -> None:
    (tmp_path / "GC.csv").write_text("https://example.org\n" + COMMAS.replace("time", "Date"))
    found = read(tmp_path / "GC.csv")
    assert found.counts["bars"] == 10
    assert "lines above them skipped: 1" in found.notes[0]


def test_columns_are_chosen_by_name_and_number(tmp_path: Path) -> None:
    text = "\n".join(f"2024-01-02 09:3{n},9,1,2,0,1" for n in range(5))
    (tmp_path / "GC.csv").write_text(text)
    columns = {"open": "3", "high": "4", "low": "5", "close": "6", "volume": "2"}
    (series,) = read(tmp_path / "GC.csv", columns=columns).series
    assert [series.columns[name][0] for name in PRICES] == [1, 2, 0, 1, 9]
    with pytest.raises(ConfigError, match=r"open=first names no column. Use one of 1, 2, 3, 4, 5, 6\."):
        read(tmp_path / "GC.csv", columns={"open": "first"})


def test_own_fields_are_copied_as_numbers_or_as_words(tmp_path: Path) -> None:
    lines = [
        {"time": 1_704_187_800 + 60 * n, "o": 1, "h": 1, "l": 1, "c": 1, "rsi": "1.5", "session": "Asia"}
        for n in range(3)
    ]
    (tmp_path / "GC.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (series,) = read(tmp_path / "GC.jsonl", fields=("rsi", "session")).series
    assert series.columns["rsi"].tolist() == [1.5] * 3
    assert series.words["session"] == ["Asia"] * 3


def test_a_damaged_table_and_one_without_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "GC.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="incomplete or damaged file"):
        read(tmp_path / "GC.parquet")
    parquet.write_table(pa.table({"open": pa.array([], pa.float64())}), tmp_path / "GC.parquet")
    with pytest.raises(DataError, match="the file has no bars"):
        read(tmp_path / "GC.parquet")


def test_an_index_of_pandas_is_the_time(tmp_path: Path) -> None:
    times = [f"2024-01-02 09:3{n}:00+00:00" for n in range(4)]
    (tmp_path / "GC.csv").write_text("\n".join([",Open,High,Low,Close", *(f"{time},1,1,1,1" for time in times)]))
    stamps = pa.array([1_704_187_800_000 + 60_000 * n for n in range(4)], pa.timestamp("ms", "UTC"))
    ones = pa.array([1.0] * 4)
    table = pa.table({"Open": ones, "High": ones, "Low": ones, "Close": ones, "__index_level_0__": stamps})
    parquet.write_table(table, tmp_path / "GC.parquet")
    first, second = (read(tmp_path / name).series[0].opens_T.tolist() for name in ("GC.csv", "GC.parquet"))
    assert first == second


def test_files_with_bars_of_two_lengths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(COMMAS)
    lines = ["time,open,high,low,close", *(f"2024-01-03 1{n}:00,1,1,1,1" for n in range(4))]
    (tmp_path / "b.csv").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"all files must have bars of one length, got 1 minute in .* 1 hour in"):
        read_market([tmp_path / "a.csv", tmp_path / "b.csv"], ReadOptions())


def test_an_object_without_bars_names_what_it_has(tmp_path: Path) -> None:
    said = faults_of('{"status": "error", "bars": [1, 2]}', tmp_path, "GC.json")
    assert said == '/GC.json: the object must hold an array of bars, or one array for each field, got "status, bars".'


@pytest.mark.parametrize(
    ("column", "is_taken"),
    [
        ("Volume BTC", True),
        ("Volume USDT", True),
        ("Vol.", True),
        ("Vol. (EUR)", True),
        ("volatility_20", False),
        ("Volume MA", False),
        ("volume_sma_20", False),
        ("Volume SMA", False),
    ],
)
def test_a_column_that_merely_begins_with_volume_is_not_the_volume(column: str, is_taken: bool, tmp_path: Path) -> None:
    lines = [f"2024-01-02 09:3{n},1,1,1,1,7" for n in range(5)]
    (tmp_path / "GC.csv").write_text("\n".join([f"time,open,high,low,close,{column}", *lines]))
    found = read(tmp_path / "GC.csv")
    assert ("volume" in found.series[0].columns) == is_taken
    assert any(f"volume = {column}" in line for line in found.notes) == is_taken


@pytest.mark.parametrize("preamble", ["   ", " \t ", "Report\n  ", "\u00a0"])
def test_a_blank_line_above_the_names_loses_no_bar(preamble: str, tmp_path: Path) -> None:
    for text in (COMMAS, "\n".join(COMMAS.split("\n")[1:])):
        if preamble.startswith("Report") and text is not COMMAS:
            continue
        (tmp_path / "GC.csv").write_text(f"{preamble}\n{text}")
        found = read(tmp_path / "GC.csv")
        assert found.counts["bars"] == 10
