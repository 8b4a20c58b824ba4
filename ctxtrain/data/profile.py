"""What is kept of a file after a walk through it: enough to find leaks and to describe the rows, not the rows.

Comes in: a `WindowFile`. Goes out: a `Survey`, a few hundred bytes a row, and an evenly spaced sample of what stands at
the events.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.codec import CodecFitter
from ctxtrain.data.features import WindowNumbers, window_numbers
from ctxtrain.data.formats import WindowFile
from ctxtrain.data.positions import Places, symbol_lines
from ctxtrain.data.schema import Window
from ctxtrain.data.time_units import moment
from ctxtrain.errors import DataError
from ctxtrain.labels import LABELS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Values = dict[str, float]

WILD_NAMED = 5
MOST_SAMPLED = 4_000  # rows whose numbers are kept, spread evenly over the file


@dataclass
class EventSample:
    """Numbers of every `stride`-th row: `values` has what stands at the event, `shape` what the window is like.

    When the sample is full every other row goes and the stride doubles, so it stays even however long the file is.
    """

    stride: int = 1
    rows: list[int] = field(default_factory=list)
    values: list[Values] = field(default_factory=list)
    shape: list[Values] = field(default_factory=list)

    def see(self, row: int, window: Window, numbers: WindowNumbers | None) -> None:
        if row % self.stride:
            return
        if len(self.rows) == MOST_SAMPLED:
            self.stride *= 2
            self.rows, self.values, self.shape = self.rows[::2], self.values[::2], self.shape[::2]
            if row % self.stride:
                return
        self.rows.append(row)
        self.values.append(_at_event(window))
        self.shape.append(_shape(window, numbers))


@dataclass
class Survey:
    """One entry a good row, in the order of the file.

    `contents` is 16 bytes of a SHA-256 of all that a model could read of a window, `changes` how many bars differ from
    the bar before in price or volume, at most 127; a text has 127. `wild` has the rows with a print that is far off.
    """

    file: WindowFile
    names: list[str] = field(default_factory=list)
    ids: list[str | None] = field(default_factory=list)
    labels: array[int] = field(default_factory=lambda: array("b"))
    bars: array[int] = field(default_factory=lambda: array("b"))
    places: Places = field(default_factory=Places)
    contents: list[bytes] = field(default_factory=list)
    changes: array[int] = field(default_factory=lambda: array("b"))
    wild: dict[str, list[int]] = field(default_factory=dict)
    fields: CodecFitter = field(default_factory=CodecFitter)
    sample: EventSample = field(default_factory=EventSample)

    def class_numbers(self) -> Ints:
        """Labels as numbers, of shape (rows,)."""
        return np.array(self.labels, dtype=np.int64)

    def see(self, window: Window) -> None:
        numbers = window_numbers(window.bars) if window.text is None else None
        self.sample.see(len(self.names), window, numbers)
        self.fields.see(window)
        self.names.append(window.name)
        self.ids.append(window.id)
        self.labels.append(-1 if window.label is None else window.label)
        self.bars.append(len(window.bars["close"]) if window.text is None else 0)
        self.places.see(window)
        self.contents.append(_content(window))
        self.changes.append(_changes(window))
        for name, is_wild in numbers.wild.items() if numbers else ():
            if is_wild.any():
                self.wild.setdefault(name, []).append(len(self.names) - 1)


def survey(file: WindowFile) -> tuple[Survey, DataError | None]:
    """Walk through a file once; what is wrong with it comes back as an error that names every fault."""
    found = Survey(file)
    try:
        for window in file:
            found.see(window)
        file.reading.refuse_faults()
    except DataError as error:
        return found, error
    return found, None


def extent(survey: Survey) -> dict[str, Any]:
    """Which symbols a file is about, the unit of its times, how many rows have none, and first and last event, in UTC.

    The events are None where rows say no time, or plain numbers.
    """
    time = survey.places.time
    dated = survey.places.kind == "dates" and time.share == 1
    return {
        "symbols": sorted(spellings[0] for spellings in survey.places.spellings.values()),
        "first_event": moment(min(time.last)) if dated else None,
        "last_event": moment(max(time.last)) if dated else None,
        "time_unit": survey.file.reading.noticed.time_unit(),
        "rows_without_time": len(time.known) - sum(time.known),
    }


def noticed(surveys: Mapping[str, Survey]) -> dict[str, list[str]]:
    """By file, what a person should know about its rows: what was dropped, guessed or put right."""
    found = {name: list(one.file.reading.noticed.lines()) for name, one in surveys.items()}
    for name, lines in symbol_lines({name: one.places for name, one in surveys.items()}).items():
        found[name] += lines
    if "train" in surveys:
        known = surveys["train"].fields.counts
        for name, one in surveys.items():
            if more := sorted(field for field in one.fields.counts if field not in known):
                found[name].append(f"no model reads {', '.join(more)}, which the training rows do not have")
    return found


def wild_prints(one: Survey) -> dict[str, dict[str, Any]]:
    """Of price, volume and delta: how many rows have a print that is far off, and the names of some."""
    return {
        field: {"rows": len(rows), "examples": [one.names[row] for row in rows[:WILD_NAMED]]}
        for field, rows in one.wild.items()
    }


def wild_line(field: str, found: Mapping[str, Any]) -> str:
    """An entry of `wild_prints` in words."""
    named = ", ".join(found["examples"]) + (", …" if found["rows"] > len(found["examples"]) else "")
    has, its = ("row has", "its") if found["rows"] == 1 else ("rows have", "their")
    told = "It is drawn near and marked in the text; mend it if it is an error."
    return f"{found['rows']:,} {has} a {field} far off all others of {its} window: {named}. {told}"


def _at_event(window: Window) -> Values:
    """The fields of the event's bar and the row's features; of a text row, how often it spells each label."""
    if window.text is not None:
        return {f"the word {label} in context": float(window.text.upper().count(label)) for label in LABELS}
    bar = {name: float(values[-1]) for name, values in window.bars.items()}
    return bar | {f"features.{name}": value for name, value in window.features.items()}


def _shape(window: Window, numbers: WindowNumbers | None) -> Values:
    """Volatility, range, volume and where the event stands, free of the price level that no model sees."""
    if numbers is None:
        return {"characters": float(len(window.text or ""))}
    shape = {
        "bars": float(len(numbers.close)),
        "bar range / price": float(numbers.bar_range_share),
        "window range / bar range": float(numbers.range_in_bars),
        "mean volume": float(window.bars["volume"].mean()),
        "volume at the event": float(numbers.volume[-1]),
        "close within the range": float(numbers.close[-1]),
        "move over the window": float(numbers.close[-1] - numbers.close[0]),
    }
    if numbers.delta is not None:
        shape["delta at the event"] = float(numbers.delta[-1])
    return shape


def _changes(window: Window) -> int:
    if window.text is not None:
        return 127
    bars = np.array([window.bars[name] for name in ("open", "high", "low", "close", "volume")])
    return min(127, int((bars[:, 1:] != bars[:, :-1]).any(axis=0).sum()))


def _content(window: Window) -> bytes:
    digest = hashlib.sha256((window.text or "").encode())
    for name, values in window.bars.items():
        digest.update(name.encode() + values.tobytes())
    digest.update(repr(sorted(window.features.items())).encode())
    return digest.digest()[:16]
