"""JSON text → a table of bars.

Input: the text of a file. Output: an Arrow table with one column per field, a description of the format, whether its
columns have names, and the line of each row. Bars are a JSON array of arrays or of objects, one object per line, or an
object that holds such an array, or one array per field, as the answers of market interfaces do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray

from ctxtrain.bars.names import names_prices
from ctxtrain.data import strict_json
from ctxtrain.errors import DataError, short_repr

_JSON_REMEDY = "Bars in JSON are an array of arrays, an array of objects, or one object per line"
_NO_LINES = np.zeros(0, np.int64)
JsonTable = tuple[pa.Table, str, bool, NDArray[np.int64]]


def read_json(path: Path, text: bytes) -> JsonTable:
    """Table, description, whether columns have names, and the line of each row (empty for one document).

    Raises DataError with every faulty line.
    """
    if text.lstrip().startswith(b"["):
        return _read_array(path, _load(path, text), "a JSON array")
    first, _, more = text.strip().partition(b"\n")
    is_one_line = not more
    if is_one_line or not _is_object(first):
        value = _load(path, text) if is_one_line or first.strip() == b"{" else None
        if isinstance(value, dict) and (not names_prices(value) or any(isinstance(v, list) for v in value.values())):
            return _read_wrapped(path, value)
    objects, numbers = _read_json_lines(path, text)
    return to_table(_gather(objects)), "one JSON object per line", True, np.array(numbers, np.int64)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


def _load(path: Path, text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        place = f"{path}:{error.lineno}:{error.colno}"
        raise DataError(f"{place}: not valid JSON: {error.msg}. {_JSON_REMEDY}.") from None


def _read_array(path: Path, rows: list[Any], kind: str) -> JsonTable:
    if not rows:
        raise DataError(f"{path}: the file has no bars; at least one is required.")
    if all(isinstance(row, list) for row in rows):
        _require_equal_lengths(path, rows)
        columns = {str(n + 1): [row[n] for row in rows] for n in range(len(rows[0]))}
        return to_table(columns), f"{kind} of arrays", False, _NO_LINES
    if all(isinstance(row, dict) for row in rows):
        return to_table(_gather(rows)), f"{kind} of objects", True, _NO_LINES
    other = next(row for row in rows if not isinstance(row, dict))
    raise DataError(f"{path}: each element must be an array or an object, got {short_repr(other)}. {_JSON_REMEDY}.")


def _read_wrapped(path: Path, value: Mapping[str, Any]) -> JsonTable:
    """The bars inside an object: its longest array of arrays or objects, or else its arrays of equal length."""
    arrays = list(_inner_arrays(value, ""))
    if arrays:
        name, rows = max(arrays, key=lambda found: len(found[1]))
        return _read_array(path, rows, f"a JSON object, whose {name} is an array")
    fields = {name: column for name, column in value.items() if isinstance(column, list)}
    lengths = set(map(len, fields.values()))
    if names_prices(fields) and len(lengths) == 1 and lengths != {0}:
        return to_table(fields), "a JSON object with an array for each field", True, _NO_LINES
    if not value:
        raise DataError(f"{path}: the file has no bars; at least one is required.")
    names = short_repr(", ".join(value))
    raise DataError(f"{path}: the object must hold an array of bars, or one array for each field, got {names}.")


def _inner_arrays(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, list[Any]]]:
    """Every array of arrays or objects inside an object, with its dotted name."""
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _inner_arrays(inner, f"{prefix}{name}.")
        elif isinstance(inner, list) and inner and all(isinstance(row, list | dict) for row in inner):
            yield f"{prefix}{name}", inner


def _require_equal_lengths(path: Path, rows: list[list[Any]]) -> None:
    width = len(rows[0])
    faults = [
        f"{path}: element {n + 1} must have {width} values as the first has, got {len(row)}. Write the file again."
        for n, row in enumerate(rows)
        if len(row) != width
    ]
    if faults:
        raise DataError(faults)


def _read_json_lines(path: Path, text: bytes) -> tuple[list[dict[str, Any]], list[int]]:
    objects, numbers, faults = [], [], []
    for number, line in enumerate(text.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value = strict_json.loads(line.strip())
        except orjson.JSONDecodeError as error:
            faults.append(f"{path}:{number}:{error.colno}: not valid JSON: {error.msg}. {_JSON_REMEDY}.")
            if number == 1:  # one object over several lines: every line would have this fault
                break
            continue
        if isinstance(value, dict):
            objects.append(value)
            numbers.append(number)
        else:
            faults.append(f"{path}:{number}: must be a JSON object, got {short_repr(value)}. {_JSON_REMEDY}.")
    if faults:
        raise DataError(faults)
    return objects, numbers


def _gather(objects: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The values of each field, by its dotted name; None where an object lacks it."""
    columns: dict[str, list[Any]] = {}
    count = 0
    for item in objects:
        stack: list[tuple[str, Mapping[str, Any]]] = [("", item)]
        while stack:
            prefix, inner = stack.pop()
            for name, value in inner.items():
                dotted = f"{prefix}{name}"
                if isinstance(value, Mapping):
                    stack.append((f"{dotted}.", value))
                    continue
                column = columns.setdefault(dotted, [])
                column += [None] * (count - len(column))
                column.append(value)
        count += 1
    return {name: column + [None] * (count - len(column)) for name, column in columns.items()}


def to_table(columns: Mapping[str, list[Any]]) -> pa.Table:
    """An Arrow table of Python values. A column of several types becomes text."""
    return pa.table({name: _to_array(values) for name, values in columns.items()})


def _to_array(values: list[Any]) -> pa.Array:
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float}:
        try:
            return pa.array(values, pa.int64() if kinds == {int} else pa.float64())
        except (OverflowError, pa.ArrowInvalid):
            return pa.array(values, pa.float64())
    if kinds in ({bool}, {str}):
        return pa.array(values)
    texts = [value if value is None or isinstance(value, str) else orjson.dumps(value).decode() for value in values]
    return pa.array(texts, pa.string())
