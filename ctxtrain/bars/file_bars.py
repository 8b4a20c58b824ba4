"""A file of bars → prices, volume and fields with times in UTC, and what was detected in the file.

Input: a `Source` and `ReadOptions`. Output: `FileBars`: one entry per bar that has prices, in the order of the file.
What the options do not say is detected in the file; each decision is one text of `notes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ctxtrain.bars import names as column_names
from ctxtrain.bars.cells import choose_volume, with_plain_quantities, without_currency
from ctxtrain.bars.clock import BarTimes, read_bar_times
from ctxtrain.bars.field_limits import require_limits
from ctxtrain.bars.numbers import active_side, detect_decimal, is_narrow, is_text, to_flags, to_floats, to_whole
from ctxtrain.bars.own_columns import copy_field
from ctxtrain.bars.read import Source, read_source
from ctxtrain.bars.symbol_name import symbol_of_file
from ctxtrain.bars.time_columns import choose_time_columns
from ctxtrain.data.plain_values import Conversions
from ctxtrain.data.row_schema import BAR_FIELDS, MEASURES, PRICES
from ctxtrain.errors import MAX_FAULTS_SHOWN, ConfigError, DataError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_BINANCE_COLUMNS = 12
_BINANCE = {"time": "1", "open": "2", "high": "3", "low": "4", "close": "5", "volume": "6", "buy_vol": "10"}
_AVERAGE_BARS = 3  # fewest bars needed to accept a column between low and high as the average price
_DECIMALS = 8  # decimals that computed volumes are rounded to


@dataclass(frozen=True)
class ReadOptions:
    """What the user says about the files; None or empty for what is to be detected.

    `bar_length` is in nanoseconds, `columns` maps roles to columns. `fields` are columns to copy, `optional` columns to
    copy where a file has them.
    """

    symbol: str | None = None
    time_zone: str | None = None
    stamp: str | None = None
    bar_length: int | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    decimal: str | None = None
    separator: str | None = None
    dates: str | None = None
    fields: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class FileBars:
    """The bars of one file. `rows_T` are their rows in the source; `words` holds copied text columns.

    `unread` are columns that nothing is taken from; `empty` counts rows without prices, which are left out.
    `is_named_by_file` is true if the symbol is from the name of the file.
    """

    source: Source
    symbols_T: NDArray[Any]
    bar_times: BarTimes
    columns: dict[str, Floats]
    words: dict[str, list[Any]]
    notes: list[str]
    unread: list[str]
    rows_T: Ints
    empty: int
    is_named_by_file: bool
    volume_column: str | None

    def place(self, bar: int) -> str:
        return self.source.place(int(self.rows_T[bar]))


def read_file(path: Path, options: ReadOptions) -> FileBars:
    """The bars of a file. Raises DataError with every fault of the file, and ConfigError for a column that it lacks."""
    source = read_source(path, options.separator)
    chosen = _choose_columns(source, options)
    if "clock" not in options.columns:
        source, chosen = choose_time_columns(source, chosen)
    source, notes = without_currency(source, chosen)
    decimal = options.decimal or detect_decimal(path, [source.table[chosen[name]] for name in PRICES])
    source, more = with_plain_quantities(source, chosen, decimal)
    notes += more
    chosen, more = choose_volume(source, chosen, decimal, is_given="volume" in options.columns)
    notes += more
    table = source.table
    prices = {name: table[chosen[name]] for name in PRICES}
    columns = {name: to_floats(column, decimal, name, source.place) for name, column in prices.items()}
    rows_T, empty = _rows_with_prices(source, columns)
    columns |= _other_numbers(source, chosen, decimal)
    words = dict[str, list[Any]]()
    copies = (*options.fields, *(name for name in options.optional if name in source.names))
    for name in copies:
        if name not in columns:
            copied, lines = copy_field(source, name, decimal)
            notes += lines
            if isinstance(copied, np.ndarray):
                columns[name] = copied
            else:
                words[name] = copied
    require_limits(columns, source.place)
    notes = [_describe_format(source, chosen, decimal), _describe_columns(source, chosen), *notes]
    notes += _note_float32(source, {**chosen, **dict(zip(copies, copies, strict=True))}, {*columns})
    notes += _note_without_effect(source, chosen, options)
    symbols_T, symbol_note = _symbols(source, chosen, options, rows_T)
    if len(rows_T) < table.num_rows:
        columns = {name: values[rows_T] for name, values in columns.items()}
        words = {name: [values[row] for row in rows_T.tolist()] for name, values in words.items()}
        symbols_T = symbols_T[rows_T]
    bar_times = read_bar_times(source, chosen, rows_T, symbols_T, options.time_zone, options.stamp, options.dates)
    taken = {*chosen.values(), *copies}
    unread = [name for name in source.names if name not in taken]
    _add_sell_volume(columns)
    return FileBars(
        source, symbols_T, bar_times, columns, words, [*notes, symbol_note, *bar_times.notes], unread, rows_T, empty,
        not options.symbol and "symbol" not in chosen, chosen.get("volume"),
    )  # fmt: skip


def _choose_columns(source: Source, options: ReadOptions) -> dict[str, str]:
    """The column of each role: by option, by name, or by position."""
    names = source.names
    chosen = column_names.match_columns(names) if source.has_names else _positions(source)
    faults = []
    for role, column in options.columns.items():
        if not column:
            chosen.pop(role, None)
        elif column in names:
            chosen[role] = column
        elif column.isdecimal() and 1 <= int(column) <= len(names):
            chosen[role] = names[int(column) - 1]
        else:
            faults.append(f"{source.path}: {role}={column} names no column. Use one of {', '.join(names[:40])}.")
    if "time" in options.columns:
        chosen = {role: column for role, column in chosen.items() if role != "clock" or "clock" in options.columns}
    faults += [
        f"{source.path}: --fields {name} names no column. Use one of {', '.join(names[:40])}."
        for name in options.fields
        if name not in names
    ]
    if faults:
        raise ConfigError(faults)
    if "time" not in chosen and names[0] == "1":  # pandas writes a time index as a first column without a name
        chosen["time"] = "1"
    missing = [role for role in ("time", *PRICES) if role not in chosen]
    if missing:
        shown = ", ".join(names[:20])
        raise DataError(
            f"{source.path}: bars must have a time and four prices, but no column is known as {', '.join(missing)}; "
            f"the columns are {shown}. Name them with --columns {missing[0]}=COLUMN."
        )
    return chosen


def _positions(source: Source) -> dict[str, str]:
    """Columns of a file without names: time (or date and time of day), open, high, low, close, volume."""
    table, names = source.table, source.names
    if len(names) == _BINANCE_COLUMNS and all(_is_number(table[name]) for name in ("1", "7")):
        return dict(_BINANCE)
    roles = ["time", *PRICES, "volume"]
    if len(names) >= len(roles) and _is_time_of_day(table["2"]):
        roles.insert(1, "clock")
    chosen = dict(zip(roles, names, strict=False))
    place = len(roles)
    if len(names) > place and _is_average_price(source, chosen):
        chosen["volume"] = names[place]
    return chosen


def _is_average_price(source: Source, chosen: Mapping[str, str]) -> bool:
    """Whether the column after the close lies within each bar, as the average price of Kraken does."""
    table = source.table
    try:
        low, high, average, volume = (
            to_floats(table[column], ".", "volume", source.place)
            for column in (chosen["low"], chosen["high"], chosen["volume"], str(int(chosen["volume"]) + 1))
        )
    except DataError:
        return False
    traded = (average != 0) & ~np.isnan(low)
    return bool(
        traded.sum() >= _AVERAGE_BARS
        and ((average >= low) & (average <= high))[traded].all()
        and (high > low).any()
        and not np.isnan(volume).any()
    )


def _is_number(column: pa.ChunkedArray) -> bool:
    value = column[0].as_py()
    return isinstance(value, int | float) or (isinstance(value, str) and value.isdecimal())


def _is_time_of_day(column: pa.ChunkedArray) -> bool:
    value = column[0].as_py()
    return isinstance(value, str) and value.count(":") in (1, 2) and value.replace(":", "").isdecimal()


def _rows_with_prices(source: Source, prices: Mapping[str, Floats]) -> tuple[Ints, int]:
    """Rows that have all four prices. Rows without any are counted; a row with some of them is a fault."""
    lacking = np.isnan(np.stack(list(prices.values())))
    partly = np.flatnonzero(lacking.any(axis=0) & ~lacking.all(axis=0))
    if len(partly):
        missing = [", ".join(name for name, row_lacks in zip(prices, lacking[:, row], strict=True) if row_lacks)
                   for row in partly[:MAX_FAULTS_SHOWN]]  # fmt: skip
        raise DataError(
            [
                f"{source.place(int(row))}: a bar must have four prices, got none for {names}. Correct the bar."
                for row, names in zip(partly[:MAX_FAULTS_SHOWN], missing, strict=True)
            ],
            total=len(partly),
        )
    rows_T = np.flatnonzero(~lacking.all(axis=0))
    if not len(rows_T):
        raise DataError(f"{source.path}: no row has prices. Name their columns with --columns open=COLUMN,….")
    return rows_T, int(lacking.all(axis=0).sum())


def _other_numbers(source: Source, chosen: Mapping[str, str], decimal: str) -> dict[str, Floats]:
    """Volume, delta, directions, flags and all other known fields, with NaN for null."""
    table, found = source.table, dict[str, Floats]()
    for name in BAR_FIELDS:
        if name in PRICES or name not in chosen:
            continue
        column = table[chosen[name]]
        if name in MEASURES:
            found[name] = to_floats(column, decimal, name, source.place)
        elif name in column_names.DIRECTIONS:
            found[name] = to_whole(column, name, range(-1, 2), source.place)
        elif name in column_names.COUNTS:
            found[name] = to_whole(column, name, None, source.place)
        else:
            found[name] = to_flags(column, name, source.place)
    if {"fvg_active", "fvg_type"} <= chosen.keys() and not {"fvg_up", "fvg_down"} & found.keys():
        found |= active_side(table[chosen["fvg_active"]], table[chosen["fvg_type"]], source.place)
    return found


def _add_sell_volume(columns: dict[str, Floats]) -> None:
    """Selling volume of an export that has the total and the buying volume."""
    if {"volume", "buy_vol"} <= columns.keys() and "sell_vol" not in columns:
        columns["sell_vol"] = np.maximum(np.round(columns["volume"] - columns["buy_vol"], _DECIMALS), 0.0)


def _note_float32(source: Source, chosen: Mapping[str, str], read: set[str]) -> list[str]:
    """Notes about float32 columns that were read."""
    conversions = Conversions()
    for name, column in chosen.items():
        if name in read and is_narrow(source.table[column]):
            conversions.float32[name] += 1
    return list(conversions.lines())


def _symbols(source: Source, chosen: Mapping[str, str], options: ReadOptions, rows_T: Ints) -> tuple[NDArray[Any], str]:
    """The symbol of each row; that of a row without prices may be empty."""
    rows = source.table.num_rows
    if options.symbol:
        return np.full(rows, options.symbol), f"symbol {options.symbol}, from --symbol"
    if "symbol" in chosen:
        cells = source.table[chosen["symbol"]].to_pylist()
        names = np.array(["" if cell is None else str(cell).strip() for cell in cells])
        if (names[rows_T] == "").any():
            row = int(rows_T[(names[rows_T] == "").argmax()])
            raise DataError(f"{source.place(row)}: symbol must not be empty. Correct the file, or give --symbol.")
        return names, f"symbols from the column {chosen['symbol']}: {', '.join(np.unique(names[rows_T])[:6])}"
    name = symbol_of_file(source.path)
    if not name:
        rule = "the symbol must be in the file or in its name, but the name has only a date or a length"
        raise ConfigError(f"{source.path}: {rule}. Name the market of all files with --symbol.")
    return np.full(rows, name), f"symbol {name}, from the name of the file"


def _note_without_effect(source: Source, chosen: Mapping[str, str], options: ReadOptions) -> list[str]:
    """Notes about options without effect on this file."""
    notes = []
    if options.separator and not source.separator:
        notes.append(f"--separator has no effect on {source.kind}")
    if options.decimal and not any(is_text(source.table[chosen[name]]) for name in PRICES):
        notes.append("--decimal has no effect: the prices are numbers, not text")
    return notes


def _describe_format(source: Source, chosen: Mapping[str, str], decimal: str) -> str:
    has_text = any(is_text(source.table[chosen[name]]) for name in PRICES)
    mark = f", decimal {'comma' if decimal == ',' else 'point'}" if has_text else ""
    return f"{source.kind}{mark}"


def _describe_columns(source: Source, chosen: Mapping[str, str]) -> str:
    parts = [f"{role} = {column}" for role in column_names.ROLES if (column := chosen.get(role)) and role != column]
    same = [role for role in column_names.ROLES if chosen.get(role) == role]
    if same:
        parts.append(f"{', '.join(same)} under {'their own names' if same[1:] else 'its own name'}")
    if column_names.is_volume_in_currency(chosen.get("volume", "")):
        parts.append(f"{chosen['volume']} is used as the volume, by its first word; --columns volume=… names another")
    if not source.has_names and chosen.get("volume") == str(int(chosen["close"]) + 2):
        parts.append(f"column {int(chosen['close']) + 1} lies within each bar: an average price, not the volume")
    same_column = [f"{one} and {other}" for one, other in combinations(chosen, 2) if chosen[one] == chosen[other]]
    if same_column:
        parts.append(f"read from the same column: {', '.join(same_column)}")
    return ("columns: " if source.has_names else "columns by position: ") + ", ".join(parts)
