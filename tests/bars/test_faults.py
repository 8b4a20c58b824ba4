"""Files of bars that are easily misread: what is one market, one bar, one number, one time.

python -m pytest tests/bars/test_faults.py
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

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
    (line,) = [line for line in read(*paths).told if words in line]
    assert "but are read as the markets GCz and Gold; --symbol makes them one market" in line
    assert not any(words in line for line in read(*paths, symbol="GC").told)


@pytest.mark.parametrize(("unit", "minutes"), [(1000, 5), (10**6, 5), (1000, 60), (1, 5)])
def test_inclusive_closes_become_whole_opens(unit: int, minutes: int, tmp_path: Path) -> None:
    opens = [int(START.timestamp()) + 60 * minutes * n for n in range(8)]
    lines = [f"{(when + 60 * minutes) * unit - 1},1,1,1,1" for when in opens]
    (tmp_path / "a.csv").write_text("\n".join(["close_time,open,high,low,close", *lines]))
    market = read(tmp_path / "a.csv")
    assert market.series[0].opens_T.tolist() == [when * NANOSECONDS for when in opens]
    assert any("closes are the last instant of their bars" in line for line in market.told)


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
