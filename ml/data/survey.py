"""What is kept of a file after a walk through it: enough to find leaks and to describe the rows, not the rows.

Comes in: a `WindowFile`. Goes out: a `Survey`, a few hundred bytes a row, and an evenly spaced sample of what stands at
the events. `spans_of` puts the windows of several files on one scale of time.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml.data.codec import CodecFitter
from ml.data.features import window_numbers
from ml.data.rows import Window, ends, moment
from ml.data.windows import WindowFile
from ml.errors import DataError
from ml.labels import LABELS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Values = dict[str, float]

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

    def see(self, row: int, window: Window) -> None:
        if row % self.stride:
            return
        if len(self.rows) == MOST_SAMPLED:
            self.stride *= 2
            self.rows, self.values, self.shape = self.rows[::2], self.values[::2], self.shape[::2]
            if row % self.stride:
                return
        self.rows.append(row)
        self.values.append(_at_event(window))
        self.shape.append(_shape(window))


@dataclass
class Survey:
    """One entry a good row, in the order of the file. `times` and `indices` are a window's first and last place.

    `steps` is the median distance of a window's bars in time. `contents` is 16 bytes of a SHA-256 of all that a model
    could read of a window.
    """

    file: WindowFile
    names: list[str] = field(default_factory=list)
    ids: list[str | None] = field(default_factory=list)
    labels: array[int] = field(default_factory=lambda: array("b"))
    bars: array[int] = field(default_factory=lambda: array("b"))
    symbols: list[str] = field(default_factory=list)
    times: list[tuple[float, float] | None] = field(default_factory=list)
    indices: list[tuple[float, float] | None] = field(default_factory=list)
    steps: array[float] = field(default_factory=lambda: array("d"))
    contents: list[bytes] = field(default_factory=list)
    fields: CodecFitter = field(default_factory=CodecFitter)
    sample: EventSample = field(default_factory=EventSample)

    def class_numbers(self) -> Ints:
        """Labels as numbers, of shape (rows,)."""
        return np.array(self.labels, dtype=np.int64)

    def see(self, window: Window) -> None:
        self.sample.see(len(self.names), window)
        self.fields.see(window)
        self.names.append(window.name)
        self.ids.append(window.id)
        self.labels.append(-1 if window.label is None else window.label)
        self.bars.append(len(window.bars["close"]) if window.text is None else 0)
        self.symbols.append(window.symbol or "")
        self.times.append(ends(window.stamps))
        self.indices.append(ends(window.bar_indices))
        self.steps.append(np.nan if window.stamps is None else float(np.median(np.diff(window.stamps))))
        self.contents.append(_content(window))


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


@dataclass(frozen=True)
class Spans:
    """Where windows lie: symbol number, first and last bar of each, by file, and `bar`, the length of a bar of each.

    `scale` is `time`, or `bar_index` where a row has no time.
    """

    scale: str
    symbol_N: dict[str, Ints]
    first_N: dict[str, Floats]
    last_N: dict[str, Floats]
    bar_N: dict[str, Floats]


def spans_of(surveys: Mapping[str, Survey]) -> Spans | None:
    """The windows of all files on one scale, or None where some rows say neither time nor bar_index."""
    numbers = {symbol: n for n, symbol in enumerate(sorted({s for one in surveys.values() for s in one.symbols}))}
    symbol_N = {name: np.array([numbers[s] for s in one.symbols], dtype=np.int64) for name, one in surveys.items()}
    for scale in ("time", "bar_index"):
        places = {name: one.times if scale == "time" else one.indices for name, one in surveys.items()}
        if any(place is None for found in places.values() for place in found):
            continue
        ends = {name: np.array(found, dtype=np.float64).reshape(-1, 2) for name, found in places.items()}
        return Spans(
            scale,
            symbol_N,
            {name: pair[:, 0] for name, pair in ends.items()},
            {name: pair[:, 1] for name, pair in ends.items()},
            {
                name: np.array(one.steps) if scale == "time" else np.ones(len(one.names))
                for name, one in surveys.items()
            },
        )
    return None


def extent(survey: Survey) -> dict[str, Any]:
    """Which symbols a file is about, and when its first and last event are, in UTC; None where rows say no time."""
    events = [time[1] for time in survey.times if time is not None]
    known = 0 < len(events) == len(survey.times)
    return {
        "symbols": sorted({symbol for symbol in survey.symbols if symbol}),
        "first_event": moment(min(events)) if known else None,
        "last_event": moment(max(events)) if known else None,
    }


def _at_event(window: Window) -> Values:
    """The fields of the event's bar and the row's features; of a text row, how often it spells each label."""
    if window.text is not None:
        return {f"the word {label} in context": float(window.text.upper().count(label)) for label in LABELS}
    bar = {name: float(values[-1]) for name, values in window.bars.items()}
    return bar | {f"features.{name}": value for name, value in window.features.items()}


def _shape(window: Window) -> Values:
    """Volatility, range, volume and where the event stands, free of the price level that no model sees."""
    if window.text is not None:
        return {"characters": float(len(window.text))}
    numbers = window_numbers(window.bars)
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


def _content(window: Window) -> bytes:
    digest = hashlib.sha256((window.text or "").encode())
    for name, values in window.bars.items():
        digest.update(name.encode() + values.tobytes())
    digest.update(repr(sorted(window.features.items())).encode())
    return digest.digest()[:16]
