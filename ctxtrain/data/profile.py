"""Survey of a file: statistics kept from one pass, enough to find leaks and describe the rows, but not the rows.

Input: a `WindowFile`. Output: a `Survey`, as columns on disk, and an evenly spaced sample of the values at the events.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.codec_fitter import CodecFitter
from ctxtrain.data.columns import DiskColumn
from ctxtrain.data.features import WindowNumbers, window_numbers
from ctxtrain.data.parse_report import ParseReport
from ctxtrain.data.parse_window import Window
from ctxtrain.data.positions import PositionsBuilder, WindowPositions, symbol_notes
from ctxtrain.data.row_schema import PRICES, OwnFields
from ctxtrain.data.time_units import format_utc
from ctxtrain.data.window_file import WindowFile
from ctxtrain.errors import DataError
from ctxtrain.labels import LABELS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]
Values = dict[str, float]

MAX_NAMED_OUTLIERS = 5
MAX_SAMPLED_ROWS = 4_000  # evenly spaced over the file
MAX_INDICATORS = 36  # words of one category


@dataclass
class EventSample:
    """Numbers of every `stride`-th row: `values` holds those of the event, `shape` those of the window.

    `words` holds the words of the event. When the sample is full, every other row is dropped and the stride doubles, so
    the sample stays evenly spaced for any file length.
    """

    stride: int = 1
    rows: list[int] = field(default_factory=list)
    values: list[Values] = field(default_factory=list)
    shape: list[Values] = field(default_factory=list)
    words: list[dict[str, str]] = field(default_factory=list)

    def add(self, row: int, window: Window, numbers: WindowNumbers | None) -> None:
        if row % self.stride:
            return
        if len(self.rows) == MAX_SAMPLED_ROWS:
            self.stride *= 2
            self.rows, self.words = self.rows[::2], self.words[::2]
            self.values, self.shape = self.values[::2], self.shape[::2]
            if row % self.stride:
                return
        self.rows.append(row)
        self.values.append(_at_event(window))
        self.shape.append(_shape(window, numbers))
        own = {name: words[-1] for name, words in window.bar_words.items()}
        self.words.append(own | {f"features.{name}": word for name, word in window.feature_words.items()})


def event_numbers(*samples: EventSample) -> list[list[Values]]:
    """The numbers at the event of each row of each sample, and for each common word of a category whether it is there.

    The name of such an indicator is as in `features.session = London`. All samples have indicators of the same words.
    """
    counts: dict[str, Counter[str]] = {}
    for row in (row for sample in samples for row in sample.words):
        for name, word in row.items():
            counts.setdefault(name, Counter())[word] += 1
    common = [(name, word) for name, words in sorted(counts.items()) for word, _ in words.most_common(MAX_INDICATORS)]
    return [
        [
            values | {f"{name} = {word}": float(words[name] == word) for name, word in common if name in words}
            for values, words in zip(sample.values, sample.words, strict=True)
        ]
        for sample in samples
    ]


class RowNames(Sequence[str]):
    """Name of each row in messages, looked up on access."""

    def __init__(self, name: Callable[[int], str], rows: int) -> None:
        self._name = name
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
        return self._name(int(row) % self._rows)


@dataclass(frozen=True)
class Survey:
    """Facts about the rows of a file, in columns of shape (rows,), in row order.

    `labels_N` are class indices, -1 without a label. `horizons_N` are the bars after the event that the label looked
    at, -1 if the row does not say. `bars_N` is the number of bars, 0 for a row without bars.
    `contents_N2` is the first 16 bytes of a SHA-256 of everything the model could read. `changes_N` is the number of
    bars that differ from the previous bar in price or volume, at most 127; 127 for a text row, 0 for features alone.
    `ids_N` is a hash of the row id, 0 without one. `outliers` lists, by field, the rows with an outlier.
    """

    file: WindowFile
    names: RowNames
    labels_N: Ints
    horizons_N: Ints
    bars_N: Ints
    ids_N: Hashes
    contents_N2: Hashes
    changes_N: Ints
    positions: WindowPositions
    outliers: dict[str, list[int]]
    fields: CodecFitter
    sample: EventSample

    def __len__(self) -> int:
        return len(self.names)


_ROW = np.dtype(
    [("label", "i1"), ("horizon", "i4"), ("bars", "i2"), ("changes", "i1"), ("id", "u8"), ("content", "u8", (2,))]
)


class _Surveyor:
    """Collects windows one by one; `survey` returns their `Survey`."""

    def __init__(self, own: OwnFields) -> None:
        self._rows = DiskColumn(_ROW)
        self._positions = PositionsBuilder()
        self._outliers: dict[str, list[int]] = {}
        self._fields = CodecFitter(own)
        self._sample = EventSample()

    def add(self, window: Window) -> None:
        row = len(self._rows)
        numbers = window_numbers(window.bars) if window.bars else None
        self._sample.add(row, window, numbers)
        self._fields.add(window)
        self._positions.add(window)
        label = -1 if window.label is None else window.label
        horizon = -1 if window.label_horizon is None else window.label_horizon
        identity = 0 if window.id is None else int.from_bytes(_digest(window.id.encode())[:8]) or 1
        content = _content(window)
        halves = (int.from_bytes(content[:8]), int.from_bytes(content[8:]))
        self._rows.append((label, horizon, window.length, _changes(window), identity, halves))
        for name, is_outlier in numbers.outliers.items() if numbers else ():
            if is_outlier.any():
                self._outliers.setdefault(name, []).append(row)

    def survey(self, file: WindowFile) -> Survey:
        rows = self._rows.array()
        return Survey(
            file,
            RowNames(file.name, len(rows)),
            rows["label"].astype(np.int64),
            rows["horizon"],
            rows["bars"],
            rows["id"],
            rows["content"],
            rows["changes"],
            self._positions.build(),
            self._outliers,
            self._fields,
            self._sample,
        )


def survey(file: WindowFile) -> tuple[Survey, DataError | None]:
    """Read the rows once. Faults are returned as an error that lists all of them.

    The survey of a file that cannot be read to its end has no rows.
    """
    surveyor = _Surveyor(file.own)
    try:
        for window in file:
            surveyor.add(window)
    except DataError as error:
        return _Surveyor(file.own).survey(file), error
    surveyed = surveyor.survey(file)
    try:
        file.report.refuse_faults()
    except DataError as error:
        return surveyed, error
    return surveyed, None


def extent(survey: Survey) -> dict[str, Any]:
    """Symbols of a file, unit of its times, number of rows without time, and first and last event in UTC.

    The events are None if rows lack a time, or if times are plain numbers.
    """
    time = survey.positions.time
    is_dated = survey.positions.kind == "dates" and time.share == 1
    return {
        "symbols": sorted(spellings[0] for spellings in survey.positions.spellings.values()),
        "first_event": format_utc(int(time.last.min())) if is_dated else None,
        "last_event": format_utc(int(time.last.max())) if is_dated else None,
        "time_unit": survey.file.report.notices.time_unit(),
        "rows_without_time": int((~time.known).sum()),
    }


def reports(surveys: Mapping[str, Survey]) -> dict[str, ParseReport]:
    """The parse report of each split, or one under `data.train` if all splits are parts of that file."""
    if len(surveys) > 1 and len({surveyed.file.source_key for surveyed in surveys.values()}) == 1:
        return {"data.train": next(iter(surveys.values())).file.report}
    return {name: surveyed.file.report for name, surveyed in surveys.items()}


def row_notices(surveys: Mapping[str, Survey]) -> dict[str, list[str]]:
    """By split, what a user should know about its rows: what was dropped, assumed or corrected."""
    notices: dict[str, list[str]] = {name: [] for name in surveys}
    for name, report in reports(surveys).items():
        notices.setdefault(name, []).extend(report.notices.lines())
    for name, lines in symbol_notes({name: surveyed.positions for name, surveyed in surveys.items()}).items():
        notices[name] += lines
    if "train" in surveys:
        known_fields = surveys["train"].fields.counts
        notices["train"] += surveys["train"].fields.notes()
        for name, surveyed in surveys.items():
            if unknown_fields := sorted(field for field in surveyed.fields.counts if field not in known_fields):
                fields = ", ".join(unknown_fields)
                notices[name].append(f"the model does not read {fields}, which the training rows lack")
    return notices


def outlier_summary(surveyed: Survey) -> dict[str, dict[str, Any]]:
    """By price, volume and delta: the number of rows with an outlier, and the names of some."""
    return {
        field: {"rows": len(rows), "examples": [surveyed.names[row] for row in rows[:MAX_NAMED_OUTLIERS]]}
        for field, rows in surveyed.outliers.items()
    }


def outlier_message(field: str, facts: Mapping[str, Any]) -> str:
    """An entry of `outlier_summary` as text."""
    names = ", ".join(facts["examples"]) + (", …" if facts["rows"] > len(facts["examples"]) else "")
    subject = "row has" if facts["rows"] == 1 else "rows have"
    action = "It is moved closer and marked in the text; correct it if it is an error."
    return f"{facts['rows']:,} {subject} a {field} outlier within the window: {names}. {action}"


def _at_event(window: Window) -> Values:
    """Bar fields at the event, and the features; for a text row, how often it contains each label as a word."""
    if window.text is not None:
        return {f"the word {label} in context": float(window.text.upper().count(label)) for label in LABELS}
    bar = {name: float(values[-1]) for name, values in window.bars.items()}
    return bar | {f"features.{name}": value for name, value in window.features.items()}


def _shape(window: Window, numbers: WindowNumbers | None) -> Values:
    """Volatility, range, volume and relative position of the event, independent of the price level."""
    if numbers is None:
        return {} if window.text is None else {"characters": float(len(window.text))}
    shape = {
        "bars": float(len(numbers.close)),
        "bar range / price": float(numbers.bar_range_share),
        "window range / bar range": float(numbers.range_in_bars),
        "close within the range": float(numbers.close[-1]),
        "move over the window": float(numbers.close[-1] - numbers.close[0]),
    }
    if numbers.volume is not None:
        shape["mean volume"] = float(window.bars["volume"].mean())
        shape["volume at the event"] = float(numbers.volume[-1])
    if numbers.delta is not None:
        shape["delta at the event"] = float(numbers.delta[-1])
    return shape


def _changes(window: Window) -> int:
    if not window.bars:
        return 127 if window.text is not None else 0
    bars = np.array([window.bars[name] for name in (*PRICES, "volume") if name in window.bars])
    return min(127, int((bars[:, 1:] != bars[:, :-1]).any(axis=0).sum()))


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _content(window: Window) -> bytes:
    digest = hashlib.sha256((window.text or "").encode())
    for name, values in window.bars.items():
        digest.update(name.encode() + values.tobytes())
    digest.update(repr(sorted(window.features.items())).encode())
    if words := sorted(window.bar_words.items()) + sorted(window.feature_words.items()):
        digest.update(repr(words).encode())
    return digest.digest()[:16]
