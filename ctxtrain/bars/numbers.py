"""Columns of text, numbers or flags → numbers.

Input: Arrow columns. Output: float64 arrays, with NaN for a null. The decimal mark of text is detected from all prices
of a file: a mark that occurs twice in a number, or before the other mark, separates thousands. `1,234` alone can be
both, so a file in which no price decides is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ctxtrain.data.plain_values import shortest_decimals
from ctxtrain.errors import MAX_FAULTS_SHOWN, DataError, short_repr

Floats = NDArray[np.float64]
Place = Callable[[int], str]

_BLANKS = r"[\s\x{A0}\x{202F}'\x{2019}]"  # separate thousands in some countries
_COMMA_THOUSANDS = r"^[+-]?\d{1,3}(,\d{3})+$"
_TRUE, _FALSE = ("true", "1", "1.0", "yes"), ("false", "0", "0.0", "no")


def is_text(column: pa.ChunkedArray) -> bool:
    return bool(pa.types.is_string(column.type) or pa.types.is_large_string(column.type))


def is_narrow(column: pa.ChunkedArray) -> bool:
    """Whether the numbers of a column have 32 or 16 bits."""
    return bool(pa.types.is_float32(column.type) or pa.types.is_float16(column.type))


def detect_decimal(path: object, prices: Sequence[pa.ChunkedArray]) -> str:
    """The decimal mark of the prices of a file, `.` or `,`. Raises DataError if no price decides."""
    texts = [column for column in prices if is_text(column)]
    if not texts or not any(_any(pc.match_substring(column, ",")) for column in texts):
        return "."
    for column in texts:
        both = pc.filter(column, pc.and_(pc.match_substring(column, ","), pc.match_substring(column, ".")))
        if len(both):
            first = both[0].as_py()
            return "," if first.rindex(",") > first.rindex(".") else "."
    commas = [pc.filter(column, pc.match_substring(column, ",")) for column in texts]
    if any(not _all(pc.match_substring_regex(column, _COMMA_THOUSANDS)) for column in commas):
        return ","
    shown = next(column[0].as_py() for column in commas if len(column))
    if any(_any(pc.match_substring_regex(column, r"^[^,]*(,[^,]*){2,}$")) for column in commas):
        return "."  # two commas in one number
    raise DataError(
        f"{path}: prices must show whether a comma is a decimal comma or separates thousands, got {short_repr(shown)}. "
        "Add --decimal , or --decimal ."
    )


def to_floats(column: pa.ChunkedArray, decimal: str, name: str, place: Place) -> Floats:
    """Numbers with NaN for null. Raises DataError with the first cells that are no finite number."""
    if is_text(column):
        numbers, wrong = parse_text(column, decimal)
    elif is_narrow(column):
        numbers = shortest_decimals(column.to_numpy())
        wrong = np.flatnonzero(np.isinf(numbers))
    elif any(test(column.type) for test in (pa.types.is_integer, pa.types.is_floating, pa.types.is_null)):
        numbers = column.cast(pa.float64(), safe=False).to_numpy().astype(np.float64)
        wrong = np.flatnonzero(np.isinf(numbers))
    else:
        remedy = f"Name another column with --columns {name}=…"
        raise DataError(f"{place(0)}: {name} must be numbers, got a column of {column.type}. {remedy}")
    if len(wrong):
        raise DataError(
            [
                f"{place(row)}: {name} must be a number, got {short_repr(column[row].as_py())}. Correct the file, or "
                f"name another column with --columns {name}=…"
                for row in wrong[:MAX_FAULTS_SHOWN].tolist()
            ],
            total=len(wrong),
        )
    return np.asarray(numbers, np.float64)


def parse_text(column: pa.ChunkedArray, decimal: str) -> tuple[Floats, NDArray[np.intp]]:
    """Numbers, and the rows whose text is no number."""
    thousands = "." if decimal == "," else ","
    cells = pc.replace_substring_regex(column, _BLANKS, "")
    if _any(pc.match_substring(cells, thousands)):
        grouped = rf"^[+-]?\d{{1,3}}(\{thousands}\d{{3}})+(\{decimal}\d*)?$"
        good = pc.or_(pc.match_substring_regex(cells, grouped), pc.invert(pc.match_substring(cells, thousands)))
        cells = pc.if_else(good, pc.replace_substring(cells, thousands, ""), "x")
    if decimal == ",":
        cells = pc.replace_substring(cells, ",", ".")
    usual = pc.match_substring_regex(cells, r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")
    wrong = np.flatnonzero(~pc.fill_null(usual, True).to_numpy())
    numbers = pc.if_else(usual, cells, None).cast(pa.float64()).to_numpy().astype(np.float64)
    return numbers, np.unique(np.concatenate((wrong, np.flatnonzero(np.isinf(numbers)))))


def to_flags(column: pa.ChunkedArray, name: str, place: Place) -> Floats:
    """1 for true, 0 for false, NaN for null. Raises DataError for any other value."""
    if pa.types.is_boolean(column.type):
        return np.asarray(column.cast(pa.float64()).to_numpy(), np.float64)
    if is_text(column):
        cells = pc.utf8_lower(pc.utf8_trim_whitespace(column))
        yes, no = (pc.is_in(cells, pa.array(words)) for words in (_TRUE, _FALSE))
        flags = pc.if_else(yes, 1.0, pc.if_else(no, 0.0, None)).to_numpy().astype(np.float64)
        unknown = np.isnan(flags) & ~np.asarray(column.is_null().to_numpy(), bool)
    else:
        flags = to_floats(column, ".", name, place)
        unknown = ~np.isnan(flags) & (flags != 0) & (flags != 1)
    _refuse(column, unknown, f"{name} must be true or false", name, place)
    return np.asarray(flags, np.float64)


def to_whole(column: pa.ChunkedArray, name: str, allowed: range | None, place: Place) -> Floats:
    """Whole numbers with NaN for null, within `allowed` if given. Raises DataError for any other value."""
    numbers = to_floats(column, ".", name, place)
    unknown = ~np.isnan(numbers) & (numbers != np.rint(numbers))
    rule = f"{name} must be a whole number"
    if allowed:
        unknown |= (numbers < allowed[0]) | (numbers > allowed[-1])
        rule += f" from {allowed[0]} to {allowed[-1]}"
    _refuse(column, unknown, rule, name, place)
    return numbers


def _refuse(column: pa.ChunkedArray, unknown: NDArray[np.bool_], rule: str, name: str, place: Place) -> None:
    rows = np.flatnonzero(unknown)
    if len(rows):
        remedy = f"Correct the file, or leave the field out with --columns {name}="
        faults = [
            f"{place(row)}: {rule}, got {short_repr(column[row].as_py())}. {remedy}"
            for row in rows[:MAX_FAULTS_SHOWN].tolist()
        ]
        raise DataError(faults, total=len(rows))


def active_side(active: pa.ChunkedArray, side: pa.ChunkedArray, place: Place) -> Mapping[str, Floats]:
    """`fvg_up` and `fvg_down` of an export that has one active gap with a side, bullish or bearish."""
    is_active = to_flags(active, "fvg_active", place) == 1
    if not (is_text(side) or pa.types.is_null(side.type)):
        raise DataError(f"{place(0)}: fvg_type must be words, got a column of {side.type}. Use --columns fvg_type=")
    words = pc.utf8_lower(side.cast(pa.string()))
    return {
        field: (is_active & np.asarray(pc.fill_null(pc.equal(words, word), False).to_numpy(), bool)).astype(np.float64)
        for field, word in (("fvg_up", "bullish"), ("fvg_down", "bearish"))
    }


def _any(mask: pa.ChunkedArray) -> bool:
    return bool(pc.any(mask).as_py())


def _all(mask: pa.ChunkedArray) -> bool:
    return bool(pc.all(mask).as_py() is not False)
