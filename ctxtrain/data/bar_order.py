"""Position of a row's bars: in time, by bar_index, or unknown.

Input: the bars of a row, in file order. Output: a `WindowPosition`, or the faults of the bar order. Bars without `time`
may carry it under another name of `time_units.py`, such as `timestamp`. If no field has such a name, any
field that parses as a time on all bars is used to check the order: bars that run newest first by it are refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from ctxtrain.data.time_units import (
    ISO,
    NAIVE,
    PLAIN_NUMBER,
    bar_length,
    format_utc,
    is_named_like_a_time,
    parse_time,
    time_names,
)
from ctxtrain.errors import short_repr

Bars = Sequence[Mapping[str, Any]]
Coordinates = Sequence[int | None]

REGULAR = 0.5  # a numeric field is a time if at least this share of its steps is equal


@dataclass(frozen=True, slots=True)
class Interval:
    """First and last bar, and the median step between neighbouring bars: in nanoseconds, or in bar_index units."""

    first: int
    last: int
    step: int


@dataclass(frozen=True, slots=True)
class WindowPosition:
    """Position of a window. `time` and `index` are None if the first or the last bar lacks them.

    `unit` is the unit of the times ("" without times) and `time_name` the field they come from. `rejected_time_name` is
    another field that is named like a time but does not parse as one. `lacking` counts the bars that lack a time or an
    index while others have it. `indices` holds the bar_index of each bar, `numeric_times` its time if that is a plain
    number; both are empty otherwise.
    """

    time: Interval | None = None
    index: Interval | None = None
    unit: str = ""
    time_name: str = "time"
    rejected_time_name: str = ""
    lacking: dict[str, int] = field(default_factory=dict)
    indices: Coordinates = ()
    numeric_times: Coordinates = ()

    @property
    def is_dated(self) -> bool:
        return self.time is not None and self.unit != PLAIN_NUMBER

    @property
    def event(self) -> str | None:
        """Time of the last bar as ISO 8601 in UTC, or None if it is unknown."""
        return format_utc(self.time.last) if self.time and self.is_dated else None


def locate_bars(bars: Bars, reserved: Collection[str]) -> tuple[WindowPosition, list[str]]:
    """The position of the bars, and its faults. `reserved` are field names that have another meaning."""
    faults: list[str] = []
    indices = [bar.get("bar_index") for bar in bars]
    faults += _order_faults("bar_index", indices, indices)
    time_name, (stamps, unit, faults_of_time), rejected = "time", _parse_times(bars, "time"), ""
    if not _has_values(bars, "time"):
        for name in time_names(set().union(*bars) - set(reserved)):
            candidate = _parse_times(bars, name)
            if _is_time_like(*candidate):
                time_name, (stamps, unit, faults_of_time), rejected = name, candidate, ""
                break
            rejected = rejected or (name if _has_values(bars, name) else "")
    faults += faults_of_time or _order_faults(time_name, stamps, [bar.get(time_name) for bar in bars])
    if not unit and not faults_of_time:
        faults += _newest_first_faults(bars, set(bars[0]) - set(reserved))
    lacking = {"bar_index": indices.count(None), time_name: stamps.count(None)}
    return WindowPosition(
        _interval(stamps),
        _interval(indices),
        unit,
        time_name,
        rejected,
        {name: count for name, count in lacking.items() if 0 < count < len(bars)},
        indices if _has_values(bars, "bar_index") else (),
        stamps if unit == PLAIN_NUMBER else (),
    ), faults


def locate_event(row: Mapping[str, Any], reserved: Collection[str]) -> tuple[WindowPosition, list[str]]:
    """The position of an event without bars, from the time of its row, and its faults.

    `reserved` are row fields that have another meaning. The bar length is that of `timeframe`, or 0 if it has none.
    """
    names = ["time"] if row.get("time") is not None else time_names(set(row) - set(reserved))
    rejected = ""
    for name in names:
        try:
            stamp, unit = parse_time(row[name])
        except ValueError as error:
            if name == "time":
                return WindowPosition(), [f"time {error}"]
            rejected = rejected or name
            continue
        return WindowPosition(Interval(stamp, stamp, bar_length(row.get("timeframe"))), None, unit, name), []
    return WindowPosition(rejected_time_name=rejected), []


def bar_name(index: int, count: int) -> str:
    return "current_bar" if index == count - 1 else f"context_bars[{index}]"


def _has_values(bars: Bars, name: str) -> bool:
    return any(bar.get(name) is not None for bar in bars)


def _parse_times(bars: Bars, name: str) -> tuple[list[int | None], str, list[str]]:
    """Time of each bar in nanoseconds, the unit, and the first fault: a value that is no time, or another unit."""
    stamps: list[int | None] = []
    first, unit = 0, ""
    for index, bar in enumerate(bars):
        value = bar.get(name)
        if value is None:
            stamps.append(None)
            continue
        try:
            stamp, value_unit = parse_time(value)
        except ValueError as error:
            return [], "", [f"{name} {error}"]
        if unit and value_unit != unit:
            before, here = (f"{short_repr(bars[n][name])} at {bar_name(n, len(bars))}" for n in (first, index))
            return [], "", [f"{name} must have one unit in a file, but {before} is {unit} and {here} is {value_unit}"]
        if not unit:
            first, unit = index, value_unit
        stamps.append(stamp)
    return stamps, unit, []


def _is_time_like(stamps: Coordinates, unit: str, faults: list[str]) -> bool:
    """Whether a field named like a time is usable as one: values change, and plain numbers only rise or only fall."""
    steps = _steps(stamps)
    is_backwards = min(steps) < 0 and (unit != PLAIN_NUMBER or max(steps) < 0)
    return not faults and (min(steps) > 0 or is_backwards)


def _newest_first_faults(bars: Bars, names: Collection[str]) -> list[str]:
    """Faults of bars that run newest first by any field that parses as a time on every bar.

    A number may look like a date by chance. It counts as a time if its name says so, or if most of its steps are equal.
    """
    for name in sorted(name for name in names if isinstance(name, str)):
        try:
            (first, unit), (last, _) = parse_time(bars[0][name]), parse_time(bars[-1].get(name))
        except ValueError:
            continue
        if unit == PLAIN_NUMBER or last >= first:
            continue
        stamps, unit, faults = _parse_times(bars, name)
        steps = _steps(stamps)
        if faults or None in stamps or max(steps) >= 0:
            continue
        is_regular = Counter(steps).most_common(1)[0][1] >= REGULAR * len(steps)
        if unit in (ISO, NAIVE) or is_named_like_a_time(name) or is_regular:
            return _order_faults(name, stamps, [bar[name] for bar in bars])
    return []


def _steps(stamps: Coordinates) -> list[int]:
    """Differences between consecutive known values, or [0] if there are none."""
    known = [stamp for stamp in stamps if stamp is not None]
    return [after - before for before, after in pairwise(known)] or [0]


def _interval(stamps: Coordinates) -> Interval | None:
    first, last = (stamps[0], stamps[-1]) if stamps else (None, None)
    return None if first is None or last is None else Interval(first, last, round(median(_steps(stamps))))


def _order_faults(name: str, stamps: Coordinates, values: Sequence[object]) -> list[str]:
    """Each value must exceed the one before it. Reports only the first violation."""
    known = [(index, stamp) for index, stamp in enumerate(stamps) if stamp is not None]
    for (previous_index, previous_stamp), (index, stamp) in pairwise(known):
        if stamp <= previous_stamp:
            step = f"{short_repr(values[previous_index])} to {short_repr(values[index])}"
            is_event_earlier = index == len(values) - 1 and stamp < previous_stamp
            hint = ": a context bar is later than the event" if is_event_earlier else ""
            return [f"bars must run oldest first, but {name} goes from {step} at {bar_name(index, len(values))}{hint}"]
    return []
