"""Columns of Parquet, Feather and Arrow files → columns of the types that the other modules read.

Input: a table as it is in the file. Output: the table without structs, with text for views and dictionaries of text,
and with numbers for decimals.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ctxtrain.errors import DataError


def plain_table(path: Path, table: pa.Table) -> pa.Table:
    """Fields of structs become columns with dotted names. Raises DataError for a name that occurs twice."""
    while any(pa.types.is_struct(column.type) for column in table.schema):
        table = table.flatten()
    twice = sorted(name for name, count in Counter(table.column_names).items() if count > 1)
    if twice:
        raise DataError(f"{path}: the columns must have different names, got twice: {', '.join(twice)}. Rename one.")
    return pa.table({name: _plain_column(table[name]) for name in table.column_names})


def _plain_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        return _plain_column(pa.chunked_array([chunk.storage for chunk in column.chunks], kind.storage_type))
    if pa.types.is_dictionary(kind):
        return _plain_column(column.cast(kind.value_type))
    if pa.types.is_run_end_encoded(kind):
        return _plain_column(pa.chunked_array([pc.run_end_decode(chunk) for chunk in column.chunks], kind.value_type))
    if pa.types.is_string_view(kind) or pa.types.is_large_string(kind):
        return column.cast(pa.string())
    if pa.types.is_decimal(kind):  # by way of text, which gives the nearest number
        try:
            return column.cast(pa.int64() if kind.scale == 0 else pa.string()).cast(
                pa.int64() if kind.scale == 0 else pa.float64()
            )
        except pa.ArrowInvalid:  # above 64 bits
            return column.cast(pa.float64())
    return column
