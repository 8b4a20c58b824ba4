"""Rows in memory: a list of dicts, a frame of pandas or polars, an Arrow table, a data set → rows of plain values.

Input: an object that exports an Arrow stream (`__arrow_c_stream__`: pyarrow, polars, duckdb), a frame with `itertuples`
(pandas), or anything that can be iterated and gives mappings. None of these libraries is imported. Output: rows with
their numbers. A field that is None, NaN, NaT or NA is left out of its row, bar or features.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

import numpy as np
import orjson

from ctxtrain.data.parse_report import NumberedRow, Unreadable
from ctxtrain.data.plain_values import Conversions, decimal_number, iso_texts, shortest_decimals
from ctxtrain.errors import DataError, short_repr

_PLAIN = frozenset({str, int, bool, type(None)})
_PARTS = {"context_bars": "bars", "current_bar": "bars"}  # as messages name fields of bars


def require_rows(given: object) -> None:
    """Raise DataError, with what to pass instead, for an object that holds no rows."""
    if isinstance(given, Mapping):
        raise DataError("rows must be a list of rows, got a single dict. Pass [row].")
    if hasattr(given, "read"):
        raise DataError(
            f"rows must not be an open file, got {short_repr(type(given).__name__)}. Pass its path as text."
        )
    first = given[0] if isinstance(given, list | tuple) and given else None
    if isinstance(first, str | bytes | os.PathLike):
        rule = "rows must be a list of dicts, or the path or the URL of one file as text"
        raise DataError(f"{rule}, got a list with {short_repr(str(first))}. Pass the path itself, without a list.")
    is_table = hasattr(given, "__arrow_c_stream__")
    if not is_table and (isinstance(given, bytes | bytearray) or not isinstance(given, Iterable)):
        remedy = "Collect it first" if hasattr(given, "collect") else "Pass rows, or a path as text"
        raise DataError(f"rows must be a list of dicts, a frame or a table, got {type(given).__name__}. {remedy}.")


def memory_rows(name: str, given: Any, conversions: Conversions) -> Iterator[NumberedRow]:
    """The rows of an object. Raises DataError for columns that no row can have."""
    if hasattr(given, "itertuples"):
        yield from _numbered(_frame_rows(name, given), conversions)
    elif hasattr(given, "__arrow_c_stream__"):
        import pyarrow as pa

        from ctxtrain.data.arrow_rows import batch_rows, require_readable_columns

        reader = pa.RecordBatchReader.from_stream(given)
        require_readable_columns(name, reader.schema)
        yield from batch_rows(reader, conversions)
    else:
        yield from _numbered(given, conversions)


def canonical(row: object) -> bytes:
    """Bytes that are equal for equal rows, whatever the order of their fields."""
    try:
        options = orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS | orjson.OPT_APPEND_NEWLINE
        return orjson.dumps(row, default=repr, option=options)
    except TypeError:  # such as an integer of more than 64 bits, which is refused later
        return f"{row!r}\n".encode("utf-8", "surrogatepass")


def _frame_rows(name: str, frame: Any) -> Iterator[dict[Any, Any]]:
    names = list(frame.columns)
    if twice := sorted({str(column) for column in names if names.count(column) > 1}):
        raise DataError(f"{name}: the columns of a frame must differ, but {', '.join(twice)} occurs twice. Rename one.")
    for values in frame.itertuples(index=False, name=None):
        yield dict(zip(names, values, strict=True))


def _numbered(rows: Iterable[Any], conversions: Conversions) -> Iterator[NumberedRow]:
    from ctxtrain.data.arrow_rows import decode_json_columns

    for number, row in enumerate(rows, start=1):
        try:
            if hasattr(row, "columns"):
                remedy = "Pass plain rows, such as dataset.with_format(None)"
                raise _NoRow(f"a row must be a mapping of names to values, got a {type(row).__name__}. {remedy}.")
            values = _plain(row, "", conversions)
        except _NoRow as error:
            values = Unreadable(str(error))
        except RecursionError:
            values = Unreadable("a row must not be nested so deeply, or contain itself")
        yield number, decode_json_columns(values) if isinstance(values, dict) else values


class _NoRow(Exception):
    """A value that cannot be part of a row."""


def _plain(value: Any, path: str, conversions: Conversions) -> Any:
    """A value as JSON would have it; objects of unknown types stay, and are refused by the parser."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is float:
        return value if value == value else _missing(path, conversions)  # noqa: PLR0124  # NaN
    if kind is list or kind is tuple:
        return [_plain(item, path, conversions) for item in value]
    if hasattr(value, "as_py"):  # a scalar of pyarrow
        return _plain(value.as_py(), path, conversions)
    if kind is dict or isinstance(value, Mapping) or (hasattr(value, "keys") and hasattr(value, "__getitem__")):
        return _plain_object(value, path, conversions)
    return _plain_scalar(value, path, conversions)


def _plain_object(value: Any, path: str, conversions: Conversions) -> dict[str, Any]:
    result = {}
    for name in value.keys():  # noqa: SIM118  # rows of databases iterate over their values
        if not isinstance(name, str):
            raise _NoRow(f"names of fields must be text, got {short_repr(name)}{f' in {path}' if path else ''}")
        key = str.__str__(name)
        inner = f"{path}.{key}" if path else _PARTS.get(key, key)
        plain = _plain(value[name], inner, conversions)
        if plain is not None:
            result[key] = plain
    return result


def _plain_scalar(value: Any, path: str, conversions: Conversions) -> Any:
    """A value of another type than those of JSON."""
    if type(value).__name__ == "NAType":  # of pandas, whose comparisons have no truth value
        return _missing(path, conversions)
    if isinstance(value, np.ndarray) and value.ndim:
        return [_plain(item, path, conversions) for item in value]
    if isinstance(value, np.datetime64):
        return _missing(path, conversions) if np.isnat(value) else _plain_time(value, path)
    if isinstance(value, datetime | date | time):
        is_missing = value != value  # noqa: PLR0124  # NaT
        return _missing(path, conversions) if is_missing else value.isoformat()
    if isinstance(value, Decimal):
        return _missing(path, conversions) if value.is_qnan() else _plain_decimal(value, path)
    if isinstance(value, np.generic):
        return _plain_number(value, path, conversions)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return _plain(float(value), path, conversions)
    if hasattr(value, "__array__"):  # a tensor, or a column of a frame
        array = np.asarray(value)
        return _plain(array if array.ndim else array[()], path, conversions)
    return value


def _plain_number(value: np.generic, path: str, conversions: Conversions) -> Any:
    """The value of a scalar of numpy; a narrow number as its shortest decimal, a long one as the nearest float."""
    if isinstance(value, np.floating) and value.dtype.itemsize < np.dtype(np.float64).itemsize:
        conversions.float32[path] += 1
        return _plain(float(shortest_decimals(np.array([value]))[0]), path, conversions)
    if isinstance(value, np.longdouble):
        return _plain(float(value), path, conversions)
    return value if isinstance(value, np.clongdouble) else _plain(value.item(), path, conversions)


def _plain_time(value: np.datetime64, path: str) -> str:
    """ISO 8601 text. Raises `_NoRow` for a year that nanoseconds do not reach."""
    stamps = np.array([value]).astype("M8[ns]")
    if stamps.astype("M8[Y]")[0] != value.astype("M8[Y]"):
        raise _NoRow(f"{path} must be a time from 1678 to 2262, got {value}")
    return iso_texts(stamps.view(np.int64), "ns", has_zone=False)[0]


def _plain_decimal(value: Decimal, path: str) -> int | float:
    """A number. Raises `_NoRow` for a signalling NaN, and for a number that no float can hold."""
    if value.is_snan() or (value.is_finite() and value.adjusted() > sys.float_info.max_10_exp):
        raise _NoRow(f"{path} must be a finite number, got {short_repr(str(value))}")
    return decimal_number(value)


def _missing(path: str, conversions: Conversions) -> None:
    conversions.nan[path] += 1
