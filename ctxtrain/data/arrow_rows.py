"""Rows of Parquet and Arrow: batches of columns → rows of plain values.

Input: a file, or a stream of record batches. Output: rows with their numbers. One slice of `ROWS_PER_SLICE` rows at a
time is converted. A field that is null is left out of its row or bar: a struct has the fields of all rows, so a null
may stand for a field that the row never had. In a map, which has the names of each row, a null is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import IO, Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from ctxtrain.data import strict_json
from ctxtrain.data.parse_report import NumberedRow, Unreadable
from ctxtrain.data.plain_values import Conversions, decimal_number, iso_texts, shortest_decimals
from ctxtrain.data.row_schema import OBJECT_FLAGS
from ctxtrain.errors import DataError

ROWS_PER_SLICE = 64  # as Python values they take a few megabytes
_BUFFER = 1 << 20  # bytes read at once from a column
_INDEX = "__index_level_"  # columns that pandas adds for the index of a frame
_JSON_COLUMNS = ("context_bars", "current_bar", "features")  # may be JSON text
_PATHS = {"context_bars": "bars", "current_bar": "bars"}  # as messages name fields of bars

Kind = Callable[[pa.DataType], bool]
_types = pa.types
_REFUSED: tuple[tuple[tuple[Kind, ...], str], ...] = (
    (
        (_types.is_binary, _types.is_large_binary, _types.is_fixed_size_binary, _types.is_binary_view),
        "bytes. Write it as text or numbers, or leave it out",
    ),
    ((_types.is_duration, _types.is_interval), "a duration. Write it as a number, or leave it out"),
    ((_types.is_union,), "a union. Write it as a column of one type, or leave it out"),
)


@contextmanager
def naming_damage(name: str, kind: str) -> Iterator[None]:
    """Turn errors of pyarrow about a file into a DataError."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's
            raise
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        # A damaged length asks for any amount of memory.
        large = ", or one with batches that memory cannot hold" if isinstance(error, MemoryError) else ""
        raise DataError(
            f"{name}: incomplete or damaged {kind} file{large} ({reason}). Write or copy it again."
        ) from None


def parquet_rows(name: str, file: IO[bytes], conversions: Conversions) -> Iterator[NumberedRow]:
    """The rows of a Parquet file. Raises DataError if it is damaged or has columns that no row can have."""
    with naming_damage(name, "Parquet"):
        reader = pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False, buffer_size=_BUFFER)
        require_readable_columns(name, reader.schema_arrow)
        yield from batch_rows(reader.iter_batches(ROWS_PER_SLICE, use_threads=False), conversions)


def ipc_rows(name: str, file: IO[bytes], conversions: Conversions, *, is_stream: bool) -> Iterator[NumberedRow]:
    """The rows of an Arrow file or stream, such as Feather. Raises DataError as `parquet_rows` does."""
    with naming_damage(name, "Arrow"):
        reader = (pa.ipc.open_stream if is_stream else pa.ipc.open_file)(file)
        require_readable_columns(name, reader.schema)
        batches = reader if is_stream else map(reader.get_batch, range(reader.num_record_batches))
        yield from batch_rows(_validated(batches), conversions)


def _validated(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The batches themselves. Damaged offsets of lists and texts would otherwise read foreign memory."""
    for batch in batches:
        batch.validate(full=True)
        yield batch


def require_readable_columns(name: str, schema: pa.Schema) -> None:
    """Raises DataError with all columns and fields of types that no row can have, or that occur twice."""
    faults = [f"{name}: {fault}" for fault in _field_faults(schema, "")]
    if faults:
        raise DataError(faults)


def _field_faults(fields: Iterable[pa.Field], prefix: str) -> Iterator[str]:
    names = set()
    for item in fields:
        path = f"{prefix}{item.name}"
        if item.name in names:
            yield f"the column {path} occurs twice. Rename or remove one"
        names.add(item.name)
        yield from _type_faults(item.type, path)


def _type_faults(kind: pa.DataType, path: str) -> Iterator[str]:
    kind = _plain_type(kind)
    for tests, what in _REFUSED:
        if any(test(kind) for test in tests):
            yield f"the column {path} must have text, numbers, times, lists or structs, but it has {what}."
    if _types.is_struct(kind):
        yield from _field_faults(kind, f"{path}.")
    elif _types.is_map(kind):
        yield from _type_faults(kind.item_type, path)
    elif _is_list(kind):
        yield from _type_faults(kind.value_type, path)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values of a dictionary-encoded, run-end-encoded or extension type."""
    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif _types.is_dictionary(kind) or _types.is_run_end_encoded(kind):
            kind = kind.value_type
        else:
            return kind


def _is_list(kind: pa.DataType) -> bool:
    tests = (_types.is_list, _types.is_large_list, _types.is_fixed_size_list, _types.is_list_view)
    return any(test(kind) for test in (*tests, _types.is_large_list_view))


def batch_rows(batches: Iterable[pa.RecordBatch], conversions: Conversions) -> Iterator[NumberedRow]:
    """The rows of record batches, numbered from 1."""
    number = 0
    for batch in batches:
        names = [name for name in batch.schema.names if not name.startswith(_INDEX)]
        for start in range(0, len(batch), ROWS_PER_SLICE):
            piece = batch.slice(start, ROWS_PER_SLICE)
            columns = [_values(piece.column(name), _PATHS.get(name, name), conversions) for name in names]
            for values in zip(*columns, strict=True):
                number += 1
                row = {name: value for name, value in zip(names, values, strict=True) if value is not None}
                yield number, decode_json_columns(row)


def decode_json_columns(row: dict[str, Any]) -> dict[str, Any] | Unreadable:
    """The row with the values of columns that may be JSON text, or the fault of one of them."""
    for name in _JSON_COLUMNS:
        if isinstance(text := row.get(name), str):
            try:
                row[name] = strict_json.loads(text.encode("utf-8", "surrogatepass"))
            except orjson.JSONDecodeError as error:
                return Unreadable(f"{name} is text that is not valid JSON: {error.msg} (column {error.colno})")
    return row


def _values(array: pa.Array, path: str, conversions: Conversions) -> list[Any]:
    """Plain values of an array; null is None. `path` names the field in messages."""
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return _values(array.storage, path, conversions)
    if _types.is_dictionary(kind):
        words = _values(array.dictionary, path, conversions)
        return [None if index is None else words[index] for index in array.indices.to_pylist()]
    if _types.is_run_end_encoded(kind):
        return _values(pa.compute.run_end_decode(array), path, conversions)
    if _types.is_null(kind):
        return [None] * len(array)
    if _types.is_struct(kind):
        values = _struct_values(array, path, conversions)
    elif _types.is_map(kind):
        values = _map_values(array, path, conversions)
    elif _is_list(kind):
        values = _list_values(array, path, conversions)
    else:
        values = _flat_values(array, path, conversions)
    if not array.null_count:
        return values
    return [value if is_valid else None for value, is_valid in zip(values, array.is_valid().to_pylist(), strict=True)]


def _flat_values(array: pa.Array, path: str, conversions: Conversions) -> list[Any]:
    """Values without parts; those of null entries are arbitrary."""
    kind = array.type
    if _types.is_floating(kind):
        return _float_values(array, path, conversions)
    if _types.is_boolean(kind) or _types.is_integer(kind):
        filled = array.fill_null(False if _types.is_boolean(kind) else 0)
        plain: list[Any] = filled.to_numpy(zero_copy_only=False).tolist()
        return plain
    if _types.is_timestamp(kind):
        stamps = array.cast(pa.int64()).fill_null(0).to_numpy()
        return iso_texts(stamps, kind.unit, has_zone=kind.tz is not None)
    values: list[Any] = array.to_pylist()
    if _types.is_decimal(kind):
        return [None if value is None else decimal_number(value) for value in values]
    if _types.is_date(kind) or _types.is_time(kind):
        return [None if value is None else value.isoformat() for value in values]
    return values


def _float_values(array: pa.Array, path: str, conversions: Conversions) -> list[Any]:
    if _types.is_float16(array.type):
        array = array.cast(pa.float32())
    numbers = array.fill_null(0.0).to_numpy()
    if numbers.dtype == np.float32:
        conversions.float32[path] += len(numbers) - array.null_count
        numbers = shortest_decimals(numbers)
    is_nan = np.isnan(numbers)
    if not is_nan.any():
        return list(numbers.tolist())
    conversions.nan[path] += int(is_nan.sum())
    return [None if missing else number for number, missing in zip(numbers.tolist(), is_nan.tolist(), strict=True)]


def _struct_values(array: pa.Array, path: str, conversions: Conversions) -> list[Any]:
    names = array.type.names
    columns = [
        _values(column, f"{path}.{name}", conversions) for name, column in zip(names, array.flatten(), strict=True)
    ]
    if not columns:
        return [{} for _ in range(len(array))]
    return [
        {name: value for name, value in zip(names, values, strict=True) if value is not None or name in OBJECT_FLAGS}
        for values in zip(*columns, strict=True)
    ]


def _list_values(array: pa.Array, path: str, conversions: Conversions) -> list[Any]:
    values = _values(array.flatten(), path, conversions)  # without the content of null lists
    lengths = pa.compute.list_value_length(array).fill_null(0).to_numpy()
    ends = np.cumsum(np.concatenate([[0], lengths])).tolist()
    return [values[start:stop] for start, stop in pairwise(ends)]


def _map_values(array: pa.Array, path: str, conversions: Conversions) -> list[Any]:
    """Objects; a map that has a name twice stays a list of pairs, which no field of a row may be."""
    offsets = array.offsets.to_numpy()
    first, count = int(offsets[0]), int(offsets[-1] - offsets[0])
    names = _values(array.keys.slice(first, count), path, conversions)
    values = _values(array.items.slice(first, count), path, conversions)
    pairs = list(zip(names, values, strict=True))
    maps = [pairs[start:stop] for start, stop in pairwise((offsets - first).tolist())]
    return [dict(entries) if len(dict(entries)) == len(entries) else entries for entries in maps]
