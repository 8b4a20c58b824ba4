"""Files of bars that are easily misread: what is one market, one bar, one number, one time.

python -m pytest tests/bars/test_faults.py
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from ctxtrain.bars.file_bars import ReadOptions
from ctxtrain.bars.series import Market, read_market
from ctxtrain.bars.symbol_name import symbol_of_file
from ctxtrain.errors import ConfigError, DataError

START = datetime(2024, 1, 2, 9, 30, tzinfo=UTC)
NANOSECONDS = 10**9


def read(*paths: Path, **options: Any) -> Market:
    return read_market(paths, ReadOptions(**options))


def bars(path: Path, extra: str = "", cells: Sequence[str] = (), count: int = 10, day: int = 2) -> Path:
    """Bars of a minute from 09:30 on, with the further columns `extra`, the cells of which are `cells`."""
    lines = [f"time,open,high,low,close{extra and ','}{extra}"]
    for n in range(count):
        further = f",{cells[min(n, len(cells) - 1)]}" if cells else ""
        lines.append(f"{START + timedelta(days=day - 2, minutes=n):%Y-%m-%dT%H:%MZ},1,1,1,1{further}")
    path.write_text("\n".join(lines))
    return path


def refusal(*paths: Path, **options: Any) -> str:
    with pytest.raises((DataError, ConfigError)) as refused:
        read(*paths, **options)
    return str(refused.value).replace(f"{paths[0].parent}/", "")


@pytest.mark.parametrize(
    ("name", "symbol"),
    [
        ("EURUSD_Candlestick_5_M_BID_01.01.2024-31.01.2024.csv", "EURUSD"),
        ("EURUSD_01.01.2024-31.01.2024.csv", "EURUSD"),
        ("XBTUSD_5.csv", "XBTUSD"),
        ("XBTUSD_1440_Q2.csv", "XBTUSD"),
        ("EURUSD_2023.csv", "EURUSD"),
        ("CL 5-24.txt", "CL 5-24"),
        ("US 30.csv", "US 30"),
        ("7203.csv", "7203"),
        ("2024-10.csv", ""),
        ("20240101_20240131.csv.gz", ""),
        ("M5.csv", ""),
    ],
)
def test_lengths_and_dates_are_no_part_of_a_symbol(name: str, symbol: str) -> None:
    assert symbol_of_file(Path(name)) == symbol


@pytest.mark.parametrize("names", [("2024-10.csv", "2024-11.csv"), ("01.01.2024.csv", "5m.csv")])
def test_names_that_are_only_dates_ask_for_the_symbol(names: tuple[str, str], tmp_path: Path) -> None:
    paths = [bars(tmp_path / name, day=2 + n) for n, name in enumerate(names)]
    assert "the name has only a date or a length. Name the market of all files with --symbol" in refusal(*paths)
    assert [len(series) for series in read(*paths, symbol="GC").series] == [20]


@pytest.mark.parametrize("names", [("eurusd.csv", "EURUSD.csv"), ("Es_5m.csv", "ES-5m.csv")])
def test_symbols_that_differ_only_in_case_are_refused(names: tuple[str, str], tmp_path: Path) -> None:
    paths = [bars(tmp_path / name, day=2 + n) for n, name in enumerate(names)]
    said = refusal(*paths)
    assert "symbols must not differ only in case, got" in said
    assert "or give one with --symbol" in said


@pytest.mark.parametrize(("day", "words"), [(3, "follow one another at similar prices"), (2, "have equal bars")])
def test_files_that_look_like_one_market_are_named(day: int, words: str, tmp_path: Path) -> None:
    paths = [bars(tmp_path / "GCz.csv"), bars(tmp_path / "Gold.csv", day=day)]
    (line,) = [line for line in read(*paths).notes if words in line]
    assert "but are read as the markets GCz and Gold; --symbol makes them one market" in line
    assert not any(words in line for line in read(*paths, symbol="GC").notes)


@pytest.mark.parametrize(("unit", "minutes"), [(1000, 5), (10**6, 5), (1000, 60), (1, 5)])
def test_inclusive_closes_become_whole_opens(unit: int, minutes: int, tmp_path: Path) -> None:
    opens = [int(START.timestamp()) + 60 * minutes * n for n in range(8)]
    lines = [f"{(when + 60 * minutes) * unit - 1},1,1,1,1" for when in opens]
    (tmp_path / "a.csv").write_text("\n".join(["close_time,open,high,low,close", *lines]))
    market = read(tmp_path / "a.csv")
    assert market.series[0].opens_T.tolist() == [when * NANOSECONDS for when in opens]
    assert any("closes are the last instant of their bars" in line for line in market.notes)


@pytest.mark.parametrize(
    ("column", "cells", "options"),
    [
        ("delta", ("5", "2"), {}),
        ("ext_bos_up", ("true", "false"), {}),
        ("call", ("LONG", "SHORT"), {"optional": ("call",)}),
        ("rsi", ("1.5", ""), {"fields": ("rsi",)}),
    ],
)
def test_bars_of_one_time_that_differ_in_any_column_are_a_fault(
    column: str, cells: tuple[str, str], options: dict[str, Any], tmp_path: Path
) -> None:
    lines = bars(tmp_path / "GC.csv", column, cells[:1]).read_text().split("\n")
    (tmp_path / "GC.csv").write_text("\n".join([*lines, lines[-1]]))
    assert read(tmp_path / "GC.csv", **options).counts["duplicates"] == 1
    (tmp_path / "GC.csv").write_text("\n".join([*lines, lines[-1].replace(f",{cells[0]}", f",{cells[1]}")]))
    assert f"GC.csv:11 has other values of {column}. Delete one of them." in refusal(tmp_path / "GC.csv", **options)


@pytest.mark.parametrize("cell", ["inf", "12x"])
def test_an_odd_cell_among_numbers_is_a_fault(cell: str, tmp_path: Path) -> None:
    said = refusal(bars(tmp_path / "GC.csv", "rsi", ("1.5", cell, "2.5")), fields=("rsi",))
    assert said.startswith("GC.csv:3: --fields rsi must have numbers as most of its cells are, got ")


@pytest.mark.parametrize("cell", ["--", "n/a", "NaN", "#N/A", ""])
def test_a_mark_without_a_value_among_numbers_is_null_and_counted(cell: str, tmp_path: Path) -> None:
    market = read(bars(tmp_path / "GC.csv", "rsi", ("1.5", cell, "2.5")), fields=("rsi",))
    assert np.isnan(market.series[0].columns["rsi"][1])
    assert any("rsi: 1 of 10 cells have no number, and count as not given" in line for line in market.notes)


@pytest.mark.parametrize(
    ("cells", "values"), [(("true", "FALSE"), [True, False]), (("Asia", "EU 1"), ["Asia", "EU 1"])]
)
def test_words_stay_words_and_true_and_false_become_flags(
    cells: tuple[str, str], values: list[Any], tmp_path: Path
) -> None:
    series = read(bars(tmp_path / "GC.csv", "mark", cells), fields=("mark",)).series[0]
    assert series.words["mark"][:2] == values


def table(path: Path, **changed: pa.Array) -> Path:
    """A Parquet file of 4 bars of a minute; `changed` replaces or adds columns."""
    ones = pa.array([1.0] * 4)
    when = pa.array([1_704_187_800_000 + 60_000 * n for n in range(4)], pa.timestamp("ms", "UTC"))
    columns = {"time": when, "open": ones, "high": ones, "low": ones, "close": ones}
    parquet.write_table(pa.table(columns | changed), path)
    return path


TEXTS = [f"2024-01-02T09:3{n}:00Z" for n in range(4)]


@pytest.mark.parametrize(
    "times",
    [
        pa.array(TEXTS, pa.string_view()),
        pa.array(TEXTS).dictionary_encode(),
        pa.array([1_704_187_800 + 60 * n for n in range(4)]).cast(pa.decimal128(20, 0)),
    ],
    ids=str,
)
def test_times_of_other_arrow_types_are_read(times: pa.Array, tmp_path: Path) -> None:
    assert read(table(tmp_path / "GC.parquet", time=times)).series[0].opens_T[0] == 1_704_187_800 * NANOSECONDS


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"volume": pa.array([[1.0]] * 4)}, "volume must be numbers, got a column of list<"),
        ({"volume": pa.array([0] * 4, pa.timestamp("s"))}, "volume must be numbers, got a column of timestamp["),
        ({"time": pa.array([0] * 4, pa.time64("us"))}, "time must be text, numbers or timestamps, got time64[us]"),
        (
            {"time": pa.array([253_370_764_800] * 4, pa.timestamp("s"))},
            "times must be from 1678 to 2262, got up to 9999",
        ),
        ({"rsi": pa.array([1.0, np.inf, 1, 1])}, "GC.parquet: row 2: rsi must be a number, got Infinity"),
        ({"rsi": pa.array([[1.0]] * 4)}, "--fields rsi must name a column of numbers, flags or words, got list<"),
    ],
)
def test_columns_of_other_types_are_named(columns: dict[str, pa.Array], words: str, tmp_path: Path) -> None:
    fields = ("rsi",) if "rsi" in columns else ()
    assert words in refusal(table(tmp_path / "GC.parquet", **columns), fields=fields)


def test_a_column_name_that_occurs_twice_is_named(tmp_path: Path) -> None:
    ones = pa.array([1.0])
    feather.write_feather(pa.Table.from_arrays([ones] * 3, ["open", "x", "x"]), str(tmp_path / "GC.feather"))
    assert "must have different names, got twice: x. Rename one." in refusal(tmp_path / "GC.feather")


@pytest.mark.parametrize("kind", [pa.float32(), pa.float16()])
def test_narrow_numbers_are_read_as_their_shortest_decimals(kind: pa.DataType, tmp_path: Path) -> None:
    prices = pa.array(np.array([1.1, 1.2, 1.3, 1.4], kind.to_pandas_dtype()))
    market = read(table(tmp_path / "GC.parquet", **dict.fromkeys(("open", "high", "low", "close"), prices)))
    assert market.series[0].columns["close"].tolist() == [1.1, 1.2, 1.3, 1.4]
    assert any("close, high, low, open: numbers of 32 bits have 7 digits" in line for line in market.notes)


@pytest.mark.parametrize("text", ["{}", "[{}]", "[[],[]]", "{}\n{}", "[]", '{"data": []}'])
def test_json_without_bars_says_so(text: str, tmp_path: Path) -> None:
    (tmp_path / "GC.json").write_text(text)
    said = refusal(tmp_path / "GC.json")
    assert "the file has no bars" in said or "must hold an array of bars" in said


@pytest.mark.parametrize(
    ("column", "cell", "rule"),
    [
        ("atr_14", "-1", "atr_14 must be from 0 to 1e+15, got -1"),
        ("volume", "-5", "volume must be from 0 to 1e+15, got -5"),
        ("delta", "1e16", "delta must be from -1e+15 to 1e+15, got 1e+16"),
        ("wave_strength", "101", "wave_strength must be from 0 to 100, got 101"),
        ("mgann_leg_index", "11", "mgann_leg_index must be from 0 to 10, got 11"),
    ],
)
def test_values_beyond_the_limits_of_a_row_are_faults_of_the_file(
    column: str, cell: str, rule: str, tmp_path: Path
) -> None:
    assert f"GC.csv:4: {rule}" in refusal(bars(tmp_path / "GC.csv", column, ("1", "1", cell, "1")))


@pytest.mark.parametrize("empty", [",,,,,", ",,,,, "])
def test_empty_lines_of_excel_are_rows_without_prices(empty: str, tmp_path: Path) -> None:
    path = bars(tmp_path / "GC.csv", "symbol", ("ES",))
    path.write_text(f"{path.read_text()}\n{empty}\n{empty}")
    market = read(path)
    assert (market.series[0].symbol, len(market.series), market.counts["rows_without_prices"]) == ("ES", 1, 2)
