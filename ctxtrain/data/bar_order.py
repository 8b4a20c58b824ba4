"""Where the bars of a row stand: in time, by their index, or nowhere that is known.

Comes in: the bars as they stand in a row. Goes out: a `Placed`, or why the bars are in no order. Bars that have no
`time` may have it by another name of `time_units.py`, such as `timestamp`. Where they have it by no such name, any
field that reads as a time on every bar says the order: bars that run newest first by it are refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from ctxtrain.data.time_units import ISO, NAIVE, NUMBER, is_named_like_a_time, moment, nanoseconds, time_names
from ctxtrain.errors import shown

Bars = Sequence[Mapping[str, Any]]
Stamps = Sequence[int | None]

REGULAR = 0.5  # share of the steps that are the usual one, where bars are of a length of time


@dataclass(frozen=True, slots=True)
class Place:
    """First and last bar, and the median distance of neighbouring bars: in nanoseconds, or in numbers of bars."""

    first: int
    last: int
    step: int


@dataclass(frozen=True, slots=True)
class Placed:
    """`time` and `index` are None where the first or the last bar does not say.

    `unit` is that of the times ("" without any), `time_name` the field that has them, `untimely` another one that is
    named like a time and cannot be read as one, and `lacking` how many bars lack a place that others have.
    `indices` has the bar_index of each bar, and `counts` its time where that is a plain number; empty without any.
    """

    time: Place | None = None
    index: Place | None = None
    unit: str = ""
    time_name: str = "time"
    untimely: str = ""
    lacking: dict[str, int] = field(default_factory=dict)
    indices: Stamps = ()
    counts: Stamps = ()

    @property
    def is_dated(self) -> bool:
        return self.time is not None and self.unit != NUMBER

    @property
    def event(self) -> str | None:
        """ISO 8601 in UTC of the last bar; None where that is not known."""
        return moment(self.time.last) if self.time and self.is_dated else None


def place_bars(bars: Bars, known: Collection[str]) -> tuple[Placed, list[str]]:
    """Where the bars stand, and what is wrong with that. `known` are the names that mean something else."""
    faults: list[str] = []
    indices = [bar.get("bar_index") for bar in bars]
    faults += _order_faults("bar_index", indices, indices)
    chosen, (stamps, unit, wrong), untimely = "time", _stamps(bars, "time"), ""
    if not _has(bars, "time"):
        for name in time_names(set().union(*bars) - set(known)):
            found = _stamps(bars, name)
            if _is_clock(*found):
                chosen, (stamps, unit, wrong), untimely = name, found, ""
                break
            untimely = untimely or (name if _has(bars, name) else "")
    faults += wrong or _order_faults(chosen, stamps, [bar.get(chosen) for bar in bars])
    if not unit and not wrong:
        faults += _backward_faults(bars, set(bars[0]) - set(known))
    lacking = {"bar_index": indices.count(None), chosen: stamps.count(None)}
    return Placed(
        _place(stamps),
        _place(indices),
        unit,
        chosen,
        untimely,
        {name: count for name, count in lacking.items() if 0 < count < len(bars)},
        indices if _has(bars, "bar_index") else (),
        stamps if unit == NUMBER else (),
    ), faults


def bar_name(index: int, count: int) -> str:
    return "current_bar" if index == count - 1 else f"context_bars[{index}]"


def _has(bars: Bars, name: str) -> bool:
    return any(bar.get(name) is not None for bar in bars)


def _stamps(bars: Bars, name: str) -> tuple[list[int | None], str, list[str]]:
    """Nanoseconds of each bar, their unit, and the first fault: a value that is no time, or one in another unit."""
    stamps: list[int | None] = []
    first, unit = 0, ""
    for index, bar in enumerate(bars):
        value = bar.get(name)
        if value is None:
            stamps.append(None)
            continue
        try:
            stamp, its_unit = nanoseconds(value)
        except ValueError as error:
            return [], "", [f"{name} {error}"]
        if unit and its_unit != unit:
            one, other = (f"{shown(bars[n][name])} at {bar_name(n, len(bars))}" for n in (first, index))
            return [], "", [f"{name} must have one unit in a file, but {one} is {unit} and {other} is {its_unit}"]
        if not unit:
            first, unit = index, its_unit
        stamps.append(stamp)
    return stamps, unit, []


def _is_clock(stamps: Stamps, unit: str, wrong: list[str]) -> bool:
    """Whether a field that is named like a time is one: each bar has another, and plain numbers run one way."""
    steps = _steps(stamps)
    backwards = min(steps) < 0 and (unit != NUMBER or max(steps) < 0)
    return not wrong and (min(steps) > 0 or backwards)


def _backward_faults(bars: Bars, names: Collection[str]) -> list[str]:
    """Bars run forwards by every field that reads as a time: dates on every bar that step back each time are refused.

    A number may be a date by chance. It is one if its name says so, or if most of its steps are equal.
    """
    for name in sorted(name for name in names if isinstance(name, str)):
        try:
            (first, unit), (last, _) = nanoseconds(bars[0][name]), nanoseconds(bars[-1].get(name))
        except ValueError:
            continue
        if unit == NUMBER or last >= first:
            continue
        stamps, unit, wrong = _stamps(bars, name)
        steps = _steps(stamps)
        if wrong or None in stamps or max(steps) >= 0:
            continue
        is_regular = Counter(steps).most_common(1)[0][1] >= REGULAR * len(steps)
        if unit in (ISO, NAIVE) or is_named_like_a_time(name) or is_regular:
            return _order_faults(name, stamps, [bar[name] for bar in bars])
    return []


def _steps(stamps: Stamps) -> list[int]:
    """Distances of neighbours among those that are known; [0] if there are none."""
    known = [stamp for stamp in stamps if stamp is not None]
    return [after - before for before, after in pairwise(known)] or [0]


def _place(stamps: Stamps) -> Place | None:
    first, last = (stamps[0], stamps[-1]) if stamps else (None, None)
    return None if first is None or last is None else Place(first, last, round(median(_steps(stamps))))


def _order_faults(name: str, stamps: Stamps, values: Sequence[object]) -> list[str]:
    """Bars run forwards: each stamp is later than those before it. Only the first step back is named."""
    known = [(index, stamp) for index, stamp in enumerate(stamps) if stamp is not None]
    for (last, before), (index, stamp) in pairwise(known):
        if stamp <= before:
            step = f"{shown(values[last])} to {shown(values[index])}"
            told = ": a bar of the context lies after the event" if index == len(values) - 1 and stamp < before else ""
            return [f"bars must run oldest first, but {name} goes from {step} at {bar_name(index, len(values))}{told}"]
    return []
