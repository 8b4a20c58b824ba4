"""What is kept of a file after a walk through it: enough to find leaks and to describe the rows, not the rows.

Comes in: a `WindowFile`. Goes out: a `Survey`, as columns on disk, and an evenly spaced sample of what stands at the
events.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.codec import CodecFitter
from ctxtrain.data.columns import DiskColumn
from ctxtrain.data.features import WindowNumbers, window_numbers
from ctxtrain.data.formats import Reading
from ctxtrain.data.parse_window import Window
from ctxtrain.data.positions import Places, PlacesBuilder, symbol_lines
from ctxtrain.data.time_units import moment
from ctxtrain.data.window_file import WindowFile
from ctxtrain.errors import DataError
from ctxtrain.labels import LABELS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]
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


class RowNames(Sequence[str]):
    """What messages call each row of a file, looked up when it is asked for."""

    def __init__(self, file: WindowFile, rows: int) -> None:
        self._file = file
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[n] for n in range(*row.indices(self._rows))]
        if not -self._rows <= row < self._rows:
            raise IndexError(row)
        return self._file.name(int(row) % self._rows)


@dataclass(frozen=True)
class Survey:
    """What was found in the rows of a file, in columns of shape (rows,), in the order of the rows.

    `labels_N` are class numbers, -1 without a label, and `bars_N` bars of a window, 0 of a text. `contents_N2` is the
    first 16 bytes of a SHA-256 of all that a model could read of a window, `changes_N` how many bars differ from the
    bar before in price or volume, at most 127; a text has 127. `ids_N` has a hash of the row's id, and 0 without one.
    `wild` has the rows with a print that is far off.
    """

    file: WindowFile
    names: RowNames
    labels_N: Ints
    bars_N: Ints
    ids_N: Hashes
    contents_N2: Hashes
    changes_N: Ints
    places: Places
    wild: dict[str, list[int]]
    fields: CodecFitter
    sample: EventSample

    def __len__(self) -> int:
        return len(self.names)


_ROW = np.dtype([("label", "i1"), ("bars", "i2"), ("changes", "i1"), ("id", "u8"), ("content", "u8", (2,))])


class _Surveyor:
    """Sees windows one by one; then gives the `Survey`."""

    def __init__(self) -> None:
        self._rows = DiskColumn(_ROW)
        self._places = PlacesBuilder()
        self._wild: dict[str, list[int]] = {}
        self._fields = CodecFitter()
        self._sample = EventSample()

    def see(self, window: Window) -> None:
        row = len(self._rows)
        numbers = window_numbers(window.bars) if window.text is None else None
        self._sample.see(row, window, numbers)
        self._fields.see(window)
        self._places.see(window)
        label = -1 if window.label is None else window.label
        bars = len(window.bars["close"]) if window.text is None else 0
        identity = 0 if window.id is None else int.from_bytes(_digest(window.id.encode())[:8]) or 1
        content = _content(window)
        halves = (int.from_bytes(content[:8]), int.from_bytes(content[8:]))
        self._rows.append((label, bars, _changes(window), identity, halves))
        for name, is_wild in numbers.wild.items() if numbers else ():
            if is_wild.any():
                self._wild.setdefault(name, []).append(row)

    def survey(self, file: WindowFile) -> Survey:
        rows = self._rows.array()
        return Survey(
            file,
            RowNames(file, len(rows)),
            rows["label"].astype(np.int64),
            rows["bars"],
            rows["id"],
            rows["content"],
            rows["changes"],
            self._places.places(),
            self._wild,
            self._fields,
            self._sample,
        )


def survey(file: WindowFile) -> tuple[Survey, DataError | None]:
    """Walk through the rows once; what is wrong with them comes back as an error that names every fault.

    A file that cannot be read to its end has a survey of no rows.
    """
    found = _Surveyor()
    try:
        for window in file:
            found.see(window)
    except DataError as error:
        return _Surveyor().survey(file), error
    surveyed = found.survey(file)
    try:
        file.reading.refuse_faults()
    except DataError as error:
        return surveyed, error
    return surveyed, None


def extent(survey: Survey) -> dict[str, Any]:
    """Which symbols a file is about, the unit of its times, how many rows have none, and first and last event, in UTC.

    The events are None where rows say no time, or plain numbers.
    """
    time = survey.places.time
    dated = survey.places.kind == "dates" and time.share == 1
    return {
        "symbols": sorted(spellings[0] for spellings in survey.places.spellings.values()),
        "first_event": moment(int(time.last.min())) if dated else None,
        "last_event": moment(int(time.last.max())) if dated else None,
        "time_unit": survey.file.reading.noticed.time_unit(),
        "rows_without_time": int((~time.known).sum()),
    }


def readings(surveys: Mapping[str, Survey]) -> dict[str, Reading]:
    """What was found in each file by split; under `data.train` alone where all splits are cut from that file."""
    if len(surveys) > 1 and len({one.file.whole for one in surveys.values()}) == 1:
        return {"data.train": next(iter(surveys.values())).file.reading}
    return {name: one.file.reading for name, one in surveys.items()}


def noticed(surveys: Mapping[str, Survey]) -> dict[str, list[str]]:
    """By split, what a person should know about its rows: what was dropped, guessed or put right."""
    found: dict[str, list[str]] = {name: [] for name in surveys}
    for name, reading in readings(surveys).items():
        found.setdefault(name, []).extend(reading.noticed.lines())
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


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _content(window: Window) -> bytes:
    digest = hashlib.sha256((window.text or "").encode())
    for name, values in window.bars.items():
        digest.update(name.encode() + values.tobytes())
    digest.update(repr(sorted(window.features.items())).encode())
    return digest.digest()[:16]
