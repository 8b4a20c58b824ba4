"""Columns that the user names → numbers, flags or words of the bars.

Input: a `Source` and the name of a column. Output: numbers if all of its cells are numbers, else true and false or
words, as `data.fields` reads them. A cell that fits neither is a fault, and a mark such as `--` counts as not given.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ctxtrain.bars.numbers import is_text, parse_text, to_floats
from ctxtrain.bars.read import Source
from ctxtrain.data.row_schema import MAX_WORD_CHARS
from ctxtrain.errors import MAX_FAULTS_SHOWN, DataError, short_repr

Floats = NDArray[np.float64]
_MARKS = ["", "-", "--", "---", "nan", "n/a", "na", "null", "none", "#n/a", "#na", "nil", "."]  # of cells without value
_MOSTLY = 0.5  # share of numbers from which a column is meant as numbers


def copy_field(source: Source, name: str, decimal: str) -> tuple[Floats | list[Any], list[str]]:
    """The values, and notes about them. Raises DataError for cells or a type that no bar can have."""
    column = source.table[name]
    kind = column.type
    if is_text(column):
        return _copy_text(source, name, column, decimal)
    if pa.types.is_boolean(kind):
        return column.to_pylist(), []
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind):
        values = to_floats(column, decimal, name, source.place)
        return values, _note_missing(name, int(np.isnan(values).sum()), len(values))
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind) or pa.types.is_time(kind):
        return column.cast(pa.string()).to_pylist(), []
    raise DataError(
        f"{source.path}: --fields {name} must name a column of numbers, flags or words, got {kind}. Leave it out."
    )


def _copy_text(
    source: Source, name: str, column: pa.ChunkedArray, decimal: str
) -> tuple[Floats | list[Any], list[str]]:
    lower = pc.utf8_lower(pc.utf8_trim_whitespace(column))
    is_mark = pc.or_(pc.is_in(lower, pa.array(_MARKS)), column.is_null())
    missing = int(pc.sum(is_mark).as_py() or 0)
    given = len(column) - missing
    numbers, wrong = parse_text(pc.if_else(is_mark, None, column), decimal)
    if not len(wrong):
        return numbers, _note_missing(name, missing, len(column))
    if given - len(wrong) > _MOSTLY * given:
        rule = f"--fields {name} must have numbers as most of its cells are"
        faults = [
            f"{source.place(row)}: {rule}, got {short_repr(column[row].as_py())}. Correct the cell, or leave it empty."
            for row in wrong[:MAX_FAULTS_SHOWN].tolist()
        ]
        raise DataError(faults, total=len(wrong))
    words = lower.to_pylist()
    if {*words} - {None, ""} <= {"true", "false"}:
        return [None if not word else word == "true" for word in words], []
    long = np.flatnonzero(pc.fill_null(pc.greater(pc.utf8_length(column), MAX_WORD_CHARS), False).to_numpy())
    if len(long):
        rule = f"--fields {name} must have words of at most {MAX_WORD_CHARS} characters"
        faults = [f"{source.place(row)}: {rule}, got {short_repr(column[row].as_py())}. Leave the column out."
                  for row in long[:MAX_FAULTS_SHOWN].tolist()]  # fmt: skip
        raise DataError(faults, total=len(long))
    return [word or None for word in pc.utf8_trim_whitespace(column).to_pylist()], []


def _note_missing(name: str, missing: int, total: int) -> list[str]:
    return [f"{name}: {missing:,} of {total:,} cells have no number, and count as not given"] if missing else []
