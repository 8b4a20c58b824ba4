"""Times of a file → nanoseconds since 1970, local or UTC.

Input: the Arrow column of the times, and that of the times of day if these are a second column. Output: `ParsedTimes`.
A number is seconds, milli-, micro- or nanoseconds since 1970. Text may be `2024-01-02 09:30:00`, `2024.01.02`,
`02/01/2024`, `20240102 093000`, with or without an offset or the name of a zone. Whether a date begins with the day or
the month is detected from the whole column.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ctxtrain.bars.numbers import is_text
from ctxtrain.data.time_units import PLAIN_NUMBER, SECOND, UNITS, parse_time
from ctxtrain.errors import MAX_FAULTS_SHOWN, DataError, short_repr

Ints = NDArray[np.int64]
Place = Callable[[int], str]

DAY = 86_400 * SECOND
_TIME_OF_DAY = (
    r"(?:(?P<sep>[T,\-]?) *(?P<H>\d{1,2}):?(?P<M>\d{2})(?::?(?P<S>\d{2})(?:[.,](?P<f>\d{1,9}))?)?"
    r" ?(?P<p>[AaPp][Mm])?)?"
    r" *(?P<z>(?:GMT|UTC)?[+-]\d{2}(?::?\d{2})?|[A-Za-z][A-Za-z_]*(?:/[A-Za-z_+\-0-9]+)*)?$"
)
_YEAR_FIRST = r"^(?P<y>\d{4})[-./](?P<m>\d{1,2})[-./](?P<d>\d{1,2})" + _TIME_OF_DAY
_COMPACT = r"^(?P<y>\d{4})(?P<m>\d{2})(?P<d>\d{2})" + _TIME_OF_DAY
_YEAR_LAST = r"^(?P<m>\d{1,2})[-./](?P<d>\d{1,2})[-./](?P<y>\d{4}|\d{2})" + _TIME_OF_DAY
_DIGIT_DATES = r"^(19|20|21)\d{2}(0[1-9]|1[0-2])([0-2]\d|3[01])(([01]\d|2[0-3])[0-5]\d([0-5]\d)?)?$"
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAY_MONTH = r"^(\d{1,2})[- /.]+([A-Za-z]{3})[a-z]*[- /.,]+(\d{4})(.*)$"
_MONTH_DAY = r"^([A-Za-z]{3})[a-z]*[- /.]+(\d{1,2})[- /.,]+(\d{4})(.*)$"
_NAMED_MONTH = f"{_DAY_MONTH}|{_MONTH_DAY}"
_REMEDY = "Write ISO 8601, or name another column with --columns time=…"


@dataclass(frozen=True)
class ParsedTimes:
    """Nanoseconds since 1970 of each row. `is_utc` says whether they are UTC; otherwise `zones_T` names their zones,
    or is empty if the file names none. `dates_only` is true if there is no time of day. `description` is the format.
    """

    stamps_T: Ints
    is_utc: bool
    description: str
    zones_T: NDArray[Any]
    dates_only: bool = False
    compact: bool = False


def parse_times(
    column: pa.ChunkedArray, time_of_day: pa.ChunkedArray | None, dates: str | None, place: Place
) -> ParsedTimes:
    """Parse every time. `dates` is `dmy`, `mdy` or None. Raises DataError with the places of the faulty times."""
    none = np.zeros(0, np.str_)
    missing = np.flatnonzero(column.is_null().to_numpy())
    if len(missing):
        faults = [
            f"{place(row)}: a bar must have a time, got none. {_REMEDY}" for row in missing[:MAX_FAULTS_SHOWN].tolist()
        ]
        raise DataError(faults, total=len(missing))
    if pa.types.is_timestamp(column.type):
        stamps_T = _in_nanoseconds(column, place)
        return ParsedTimes(stamps_T, column.type.tz is not None, str(column.type), none)
    if pa.types.is_date(column.type) and time_of_day is None:
        stamps_T = _in_nanoseconds(column, place)
        return ParsedTimes(stamps_T, is_utc=False, description="dates", zones_T=none, dates_only=True)
    known = (is_text(column), pa.types.is_integer(column.type), pa.types.is_floating(column.type))
    if not any(known) and not (time_of_day is not None and pa.types.is_date(column.type)):
        raise DataError(f"{place(0)}: time must be text, numbers or timestamps, got {column.type}. {_REMEDY}")
    if is_text(column) or time_of_day is not None:
        text = pc.utf8_trim_whitespace(column.cast(pa.string()))
        if time_of_day is not None:
            text = pc.binary_join_element_wise(text, _time_of_day_text(time_of_day), " ")
        elif pc.all(pc.match_substring_regex(text, r"^[0-8]?\d{1,18}(\.\d+)?$")).as_py() and not are_digit_dates(text):
            return _parse_epoch(text.cast(pa.float64() if _any_dot(text) else pa.int64()), place)
        return _parse_text(text, dates, place)
    if pa.types.is_integer(column.type) and are_digit_dates(column.cast(pa.string())):
        return _parse_text(column.cast(pa.string()), dates, place)
    return _parse_epoch(column, place)


def _in_nanoseconds(column: pa.ChunkedArray, place: Place) -> Ints:
    """Timestamps or dates as nanoseconds. Raises DataError for years that nanoseconds do not reach."""
    try:
        return np.asarray(column.cast(pa.timestamp("ns")).cast(pa.int64()).to_numpy(), np.int64)
    except pa.ArrowInvalid:
        latest = pc.max(column.cast(pa.string())).as_py()
        raise DataError(f"{place(0)}: times must be from 1678 to 2262, got up to {latest}. {_REMEDY}") from None


def _any_dot(text: pa.ChunkedArray) -> bool:
    return bool(pc.any(pc.match_substring(text, ".")).as_py())


def are_digit_dates(text: pa.ChunkedArray) -> bool:
    return bool(pc.all(pc.match_substring_regex(text, _DIGIT_DATES)).as_py())


def _time_of_day_text(time_of_day: pa.ChunkedArray) -> pa.ChunkedArray:
    """The times of day as text; one in digits may have lost its leading zeros, as in 93000."""
    if pa.types.is_time(time_of_day.type):
        return time_of_day.cast(pa.string())
    text = pc.utf8_trim_whitespace(time_of_day.cast(pa.string()))
    if pc.all(pc.match_substring_regex(text, r"^\d{1,6}$")).as_py():
        longest = pc.max(pc.utf8_length(text)).as_py()
        return pc.utf8_lpad(text, 6 if longest > 4 else 4, "0")  # HHMM has four digits
    return text


def _parse_epoch(column: pa.ChunkedArray, place: Place) -> ParsedTimes:
    try:
        values = column.to_numpy()
        extremes = [int(values.argmin()), int(values.argmax())]
        units = [parse_time(values[row].item())[1] for row in extremes]
    except (TypeError, ValueError) as error:
        bad = next((row for row in (*extremes, 0) if not _is_time(values[row].item())), 0)
        raise DataError(f"{place(bad)}: time {error}. {_REMEDY}") from None
    if units[0] != units[1] or units[0] == PLAIN_NUMBER:
        shown = " and ".join(f"{values[row].item()} ({unit})" for row, unit in zip(extremes, units, strict=True))
        raise DataError(f"{place(extremes[0])}: times must have one unit in a file, got {shown}. {_REMEDY}")
    scale = SECOND // UNITS[units[0]][1]
    stamps_T = values * scale if values.dtype.kind == "i" else np.rint(values * scale)
    return ParsedTimes(stamps_T.astype(np.int64), is_utc=True, description=units[0], zones_T=np.zeros(0, np.str_))


def _is_time(value: object) -> bool:
    try:
        parse_time(value)
    except ValueError:
        return False
    return True


def _with_numbered_months(text: pa.ChunkedArray) -> pa.ChunkedArray:
    """`02-Jan-2024` and `Jan 02, 2024` as `2024-01-02`; other texts as they are."""
    if not pc.match_substring_regex(text[:1], _NAMED_MONTH)[0].as_py():
        return text
    text = pc.replace_substring_regex(text, _DAY_MONTH, r"\3-\2-\1\4")
    text = pc.replace_substring_regex(text, _MONTH_DAY, r"\3-\1-\2\4")
    for number, name in enumerate(_MONTHS, start=1):
        text = pc.replace_substring_regex(text, rf"^(\d{{4}}-)(?i:{name})-", rf"\1{number:02}-")
    return text


def _parse_text(text: pa.ChunkedArray, dates: str | None, place: Place) -> ParsedTimes:
    written, text = text, _with_numbered_months(text)
    for pattern in (_YEAR_FIRST, _COMPACT, _YEAR_LAST):
        if pc.match_substring_regex(text[:1], pattern)[0].as_py():
            break
    else:
        raise DataError(
            f"{place(0)}: time must be a known date format, got {short_repr(written[0].as_py())}. {_REMEDY}"
        )
    parts = pc.extract_regex(text, pattern).combine_chunks()
    bad = np.flatnonzero(parts.is_null().to_numpy(zero_copy_only=False))
    order = ""
    if pattern == _YEAR_LAST and not len(bad):
        order = _day_or_month_first(parts, dates, text, place)
    stamps_T, valid = _stamps(parts, swap=order == "dmy")
    bad = np.union1d(bad, np.flatnonzero(~valid))
    if len(bad):
        raise DataError(
            [
                f"{place(row)}: time must be a date in one format, got {short_repr(written[row].as_py())} where the "
                f"file begins with {short_repr(written[0].as_py())}. {_REMEDY}"
                for row in bad[:MAX_FAULTS_SHOWN].tolist()
            ],
            total=len(bad),
        )
    description = f"text such as {written[0].as_py()!r}"
    if order:
        description += ", day first" if order == "dmy" else ", month first"
    zones_T = _field(parts, "z")
    if pattern == _COMPACT:  # the form of Interactive Brokers for UTC
        zones_T = np.where((zones_T == "") & (_field(parts, "sep") == "-"), "UTC", zones_T)
    dates_only = bool((_field(parts, "H") == "").all())
    return _apply_offsets(stamps_T, zones_T, description, dates_only, pattern == _COMPACT, place)


def _field(parts: pa.StructArray, name: str) -> NDArray[Any]:
    return np.asarray(pc.fill_null(parts.field(name), "").to_numpy(zero_copy_only=False), np.str_)


def _whole(parts: pa.StructArray, name: str) -> Ints:
    text = pc.fill_null(parts.field(name), "")
    return np.asarray(pc.if_else(pc.equal(text, ""), "0", text).cast(pa.int64()), np.int64)


def _stamps(parts: pa.StructArray, *, swap: bool) -> tuple[Ints, NDArray[np.bool_]]:
    """Nanoseconds of each row as if in UTC, and whether date and time of day exist. `swap` reads the day first."""
    year, month, day = _whole(parts, "y"), _whole(parts, "m"), _whole(parts, "d")
    if swap:
        month, day = day, month
    year = np.where(year < 100, year + 2000, year)  # two digits
    hour, minute, second = _whole(parts, "H"), _whole(parts, "M"), _whole(parts, "S")
    half = np.char.lower(_field(parts, "p"))
    valid = np.where(half == "", hour < 24, (hour >= 1) & (hour <= 12)) & (minute < 60) & (second < 60)
    hour = np.where(half == "", hour, hour % 12 + np.where(half == "pm", 12, 0))
    valid &= (month >= 1) & (month <= 12) & (year >= 1800) & (year < 2200)
    months = ((year - 1970) * 12 + np.clip(month, 1, 12) - 1).astype("datetime64[M]")
    days = months.astype("datetime64[D]") + (day - 1)
    valid &= days.astype("datetime64[M]") == months
    fraction = pc.utf8_rpad(pc.fill_null(parts.field("f"), ""), 9, "0").cast(pa.int64()).to_numpy(zero_copy_only=False)
    seconds = days.astype(np.int64) * 86_400 + hour * 3600 + minute * 60 + second
    return seconds * SECOND + fraction, valid


def _day_or_month_first(parts: pa.StructArray, dates: str | None, text: pa.ChunkedArray, place: Place) -> str:
    """`dmy` or `mdy`. Raises DataError if both readings exist and run in order, or if neither does."""
    if dates:
        return dates
    first, second = _whole(parts, "m"), _whole(parts, "d")
    if first.max() > 12 or second.max() > 12:  # months
        return "dmy" if first.max() > 12 else "mdy"  # the other reading then has invalid dates
    in_order = []
    for order in ("dmy", "mdy"):
        steps = np.diff(_stamps(parts, swap=order == "dmy")[0])
        if len(steps) and ((steps >= 0).all() or (steps <= 0).all()):
            in_order.append(order)
    if len(in_order) == 1:
        return in_order[0]
    raise DataError(
        f"{place(0)}: dates must show whether the day or the month is first, got {short_repr(text[0].as_py())}, and no "
        "date of the file decides. Add --dates dmy or --dates mdy."
    )


def _apply_offsets(
    stamps_T: Ints, zones_T: NDArray[Any], description: str, dates_only: bool, compact: bool, place: Place
) -> ParsedTimes:
    """Subtract the offsets of times that have them; keep the names of zones for `time_zones.py`."""
    names, inverse = np.unique(zones_T, return_inverse=True)
    if (names == "").all():
        return ParsedTimes(stamps_T, False, description, np.zeros(0, np.str_), dates_only, compact)
    if "" in names:
        row = int((zones_T == "").argmax())
        raise DataError(f"{place(row)}: either all times of a file have a zone or none has, got one without. {_REMEDY}")
    offsets = [_offset(name) for name in names.tolist()]
    if None in offsets:
        return ParsedTimes(stamps_T, False, description, zones_T, dates_only, compact)
    return ParsedTimes(
        stamps_T - np.array(offsets, np.int64)[inverse], True, description, np.zeros(0, np.str_), dates_only, compact
    )


def _offset(name: str) -> int | None:
    """Nanoseconds that `+05:30`, `Z` or `UTC` is ahead of UTC; None for any other name."""
    if name.upper() in ("Z", "UTC", "GMT"):
        return 0
    shift = name[3:] if name[:3] in ("GMT", "UTC") else name
    if shift[:1] not in ("+", "-"):
        return None
    digits = shift[1:].replace(":", "")
    sign = -1 if shift[0] == "-" else 1
    return sign * (int(digits[:2]) * 3600 + int(digits[2:] or 0) * 60) * SECOND
