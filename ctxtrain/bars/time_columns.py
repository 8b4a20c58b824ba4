"""Which of the columns named date, time or hour hold the time of a bar.

Input: a `Source` and its columns by name. Output: the same with one column of complete times, or with a column of days
and one of times of day. A complete time is not joined with another column, whatever the names are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from ctxtrain.bars.names import plain_name
from ctxtrain.bars.numbers import is_text
from ctxtrain.bars.read import Source
from ctxtrain.bars.time_text import are_digit_dates

_HOURS = frozenset({"hour", "heure", "hora", "ora", "stunde"})
_TIME_OF_DAY = r"^\d{1,2}(:\d{2}){1,2}([.,]\d+)?( ?[AaPp][Mm])?$|^\d{1,6}$"
_HAS_TIME_OF_DAY = r"\d:\d{2}|^\d{9,19}(\.\d+)?$|\d\d[T ]\d{4,6}$"
_MIDNIGHT = r"[T ]0?0:00(:00(\.0+)?)?$"


def choose_time_columns(source: Source, chosen: Mapping[str, str]) -> tuple[Source, dict[str, str]]:
    """Drop the day or the time of day if the other is complete. Hours become HHMM, and a day loses its midnight."""
    columns = dict(chosen)
    if "clock" not in columns:
        return source, columns
    table = source.table
    day, time_of_day = table[columns["time"]], table[columns["clock"]]
    if not _all_match(time_of_day, _TIME_OF_DAY) and not pa.types.is_time(time_of_day.type):
        columns["time"] = columns.pop("clock")
        return source, columns
    if pa.types.is_timestamp(day.type) or _all_match(day, _MIDNIGHT):
        days = _days(day)
        if days is None or _all_match(time_of_day, r"^[0:.]+$"):
            del columns["clock"]
            return source, columns
        table = table.set_column(table.column_names.index(columns["time"]), columns["time"], days)
    elif _has_time_of_day(day):
        del columns["clock"]
        return source, columns
    if plain_name(columns["clock"]) in _HOURS and _all_match(time_of_day, r"^\d{1,2}$"):
        hours = pc.binary_join_element_wise(pc.utf8_lpad(_text(time_of_day), 2, "0"), "00", "")
        table = table.set_column(table.column_names.index(columns["clock"]), columns["clock"], hours)
    return replace(source, table=table), columns


def _days(day: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """The days of times that all are midnights; None if one is not."""
    if is_text(day):
        return pc.replace_substring_regex(_text(day), _MIDNIGHT, "")
    if day.type.tz is not None or pc.any(pc.not_equal(day, pc.floor_temporal(day, unit="day"))).as_py():
        return None
    return day.cast(pa.date32())


def _has_time_of_day(day: pa.ChunkedArray) -> bool:
    text = _text(day)
    return not are_digit_dates(text) and bool(pc.any(pc.match_substring_regex(text, _HAS_TIME_OF_DAY)).as_py())


def _all_match(column: pa.ChunkedArray, pattern: str) -> bool:
    """Whether all cells with a value match; false for columns of other types than text and whole numbers."""
    if not (is_text(column) or pa.types.is_integer(column.type)):
        return False
    return pc.all(pc.match_substring_regex(_text(column), pattern)).as_py() is True


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.utf8_trim_whitespace(column.cast(pa.string()))
