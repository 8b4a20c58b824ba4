"""A window becomes the text that the tokenizer sees, the same in training, evaluation and prediction.

Comes in: a `Window`. Goes out: one line of text. `compact` writes quantised integers; `json` writes the input
fields as they are, for comparison; `text` passes the prompt of a text row through. A fitted codec is saved as
`codec.json`, which fixes kind, version, fields and scales.

The compact text of a bar is `marks` + `HHLLCCVD`, bars oldest first with a blank between:

    HH LL CC   high, low, close: 00 = the window's lowest low … 99 = its highest high
    V  D       volume (log) and delta: z-score within the window, half a deviation a step, 5 = the mean; D is - where
               the rows have no delta
    marks      one letter for each pulse on its bar; one letter or letter + digit for each state, direction or
               level where it changes, and all of them on the first bar and on the event bar; O + two digits for an open
               that lies away from the close before

It ends in `r` (range of the window in mean bar ranges), `a` (mean bar range as a share of price), `t` (atr_14 in
mean bar ranges), each on a logarithmic scale, a `z` per entry of `features` (robust z-score over the training
rows), and `?`, the token at which the classifier reads.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import compress
from pathlib import Path
from typing import Literal

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from ml.data.features import WindowNumbers, window_numbers
from ml.data.rows import BAR_FIELDS, Window
from ml.errors import MAX_FAULTS_SHOWN, DataError

END = "?"
# A letter per pulse, written on each bar where it is true.
PULSES = {
    "ext_bos": "B",
    "ext_choch": "C",
    "ext_choch_up": "P",
    "ext_choch_down": "Q",
    "int_bos": "J",
    "int_choch": "K",
    "sweep_prev_high": "H",
    "sweep_prev_low": "L",
    "fvg_retest": "R",
}
# The letters for each value of a field that holds until it changes.
STATES = {
    "ext_dir": {-1: "D", 0: "N", 1: "U"},
    "int_dir": {-1: "d", 0: "n", 1: "u"},
    "fvg_up": {0: "f", 1: "F"},
    "fvg_down": {0: "g", 1: "G"},
    "pb_wave_strength_ok": {0: "w", 1: "W"},
    "mgann_leg_index": {leg: f"M{leg - 1}" for leg in range(1, 11)},
    "wave_strength": {tenth: f"S{tenth}" for tenth in range(10)},
}
OPEN_GAP = 3  # steps of 1/99 of the window's range between an open and the close before that are worth writing
_DIGITS = "0123456789"
_TWO_DIGITS = [f"{value:02d}" for value in range(100)]


class FeatureScale(BaseModel):
    """Robust location and spread of one entry of `features` over the training rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    centre: float
    spread: float


class Codec(BaseModel):
    """What was fixed when the codec was fitted; `render` depends on nothing else."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["compact", "json", "text"]
    version: Literal[1] = 1
    fields: list[str]  # of a bar, in the order of `BAR_FIELDS`
    features: dict[str, FeatureScale]

    def render(self, window: Window) -> str:
        """The text of one window. Raises DataError if it lacks what the codec was fitted on."""
        return next(self.render_all([window]))

    def render_all(self, windows: Iterable[Window]) -> Iterator[str]:
        """The texts of windows, in order. At the end raises one DataError that names all that could not be rendered."""
        faults: list[str] = []
        total = 0
        for window in windows:
            fault = self.fault(window)
            if fault is not None:
                total += 1
                faults += [f"{window.place}: {fault}"] * (len(faults) < MAX_FAULTS_SHOWN)
            elif window.text is not None:
                yield window.text
            else:
                yield self._render_json(window) if self.kind == "json" else self._render_compact(window)
        if total:
            raise DataError(faults, total=total)

    def fault(self, window: Window) -> str | None:
        """Why a window cannot be rendered, or None."""
        if (window.text is not None) != (self.kind == "text"):
            wanted, got = ("text", "window") if self.kind == "text" else ("window", "text")
            return f"the model was trained on {wanted} rows, got a {got} row"
        lacking = [name for name in self.fields if name not in window.bars]
        lacking += [f"features.{name}" for name in self.features if name not in window.features]
        if lacking:
            return (
                f"lacks {', '.join(lacking)}, which the model was trained on; "
                "add the field to every bar, or train on rows without it"
            )
        return None

    def save(self, path: Path) -> None:
        path.write_bytes(self.to_json())

    def to_json(self) -> bytes:
        return orjson.dumps(self.model_dump(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)

    @classmethod
    def load(cls, path: Path) -> Codec:
        """Raises DataError if the file is no codec of a version that this program knows."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            reasons = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise DataError(
                f"{path}: not a codec that this version reads ({reasons}). Export the model again."
            ) from None

    def _render_json(self, window: Window) -> str:
        columns = [window.bars[name].tolist() for name in self.fields]
        bars = [dict(zip(self.fields, values, strict=True)) for values in zip(*columns, strict=True)]
        features = {name: window.features[name] for name in self.features}
        return orjson.dumps({"bars": bars, "features": features}).decode()

    def _render_compact(self, window: Window) -> str:
        numbers = window_numbers(window)
        opens, *levels = _levels(np.array([numbers.open, numbers.high, numbers.low, numbers.close]))
        marks = self._marks(window, opens, levels[-1])
        volume, delta = _digits(numbers.volume), ["-"] * len(marks)
        if numbers.delta is not None and "delta" in self.fields:
            delta = _digits(numbers.delta)
        bars = [
            f"{mark}{_TWO_DIGITS[h]}{_TWO_DIGITS[lo]}{_TWO_DIGITS[c]}{v}{d}"
            for mark, h, lo, c, v, d in zip(marks, *levels, volume, delta, strict=True)
        ]
        return f"{' '.join(bars)} {self._tail(window, numbers)}{END}"

    def _marks(self, window: Window, opens: list[int], closes: list[int]) -> list[str]:
        """The letters before each bar's digits: of shape (bars,)."""
        marks: list[list[str]] = [[] for _ in opens]
        for name, written in STATES.items():
            if name not in self.fields:
                continue
            values = window.bars[name]
            if name == "wave_strength":
                values = np.minimum(values // 10, 9)
            before = None
            for bar, value in enumerate(values.tolist(), start=1):  # numpy's calls cost more than a loop over 50 bars
                if value != before or bar == len(marks):  # the event bar carries the whole state
                    marks[bar - 1].append(written[value])
                    before = value
        for name, letter in PULSES.items():
            if name in self.fields:
                for letters in compress(marks, window.bars[name].tolist()):
                    letters.append(letter)
        for letters, opened, closed in zip(marks[1:], opens[1:], closes[:-1], strict=True):
            if abs(opened - closed) >= OPEN_GAP:
                letters.append(f"O{_TWO_DIGITS[opened]}")
        return ["".join(letters) for letters in marks]

    def _tail(self, window: Window, numbers: WindowNumbers) -> str:
        parts = [
            f"r{_logarithmic(numbers.range_in_bars, steps_per_octave=16, smallest=1.0)}",
            f"a{_logarithmic(numbers.bar_range_share, steps_per_octave=6, smallest=1e-6)}",
        ]
        if numbers.atr_ratio is not None and "atr_14" in self.fields:
            parts.append(f"t{_logarithmic(numbers.atr_ratio, steps_per_octave=16, smallest=0.125)}")
        for name, scale in self.features.items():
            score = (window.features[name] - scale.centre) / scale.spread
            parts.append(f"z{_TWO_DIGITS[int(np.clip(np.rint(score * 10 + 50), 0, 99))]}")
        return "".join(parts)


class CodecFitter:
    """Sees windows one by one; then fixes the fields that every one carries, and the scale of each `features` entry."""

    def __init__(self) -> None:
        self.windows = 0
        self.is_text = False
        self.counts: Counter[str] = Counter()
        self.values: dict[str, array[float]] = {}

    def see(self, window: Window) -> None:
        self.windows += 1
        self.is_text = window.text is not None
        self.counts.update(window.bars.keys())
        self.counts.update(f"features.{name}" for name in window.features)
        for name, value in window.features.items():
            self.values.setdefault(name, array("d")).append(value)

    def partial_fields(self) -> dict[str, int]:
        """Fields and features that some windows carry and others lack, with the number of windows that carry them."""
        return {name: count for name, count in sorted(self.counts.items()) if count < self.windows}

    def fit(self, kind: Literal["compact", "json"]) -> Codec:
        """A field that only some windows carry is left out."""
        if self.is_text:
            return Codec(kind="text", fields=[], features={})
        written = [
            name for name in BAR_FIELDS if kind == "json" or name not in ("buy_vol", "sell_vol")
        ]  # delta has both
        fields = [name for name in written if self.counts[name] == self.windows]
        scales = {}
        for name in sorted(self.values):
            if len(self.values[name]) == self.windows:
                values = np.array(self.values[name])
                low, centre, high = np.quantile(values, [0.25, 0.5, 0.75])
                spread = float(high - low) / 1.349  # the quartiles of a normal lie 1.349 deviations apart
                scales[name] = FeatureScale(centre=float(centre), spread=spread or float(values.std()) or 1.0)
        return Codec(kind=kind, fields=fields, features=scales)


def fit_codec(kind: Literal["compact", "json"], windows: Iterable[Window]) -> Codec:
    """The codec of windows that are at hand."""
    fitter = CodecFitter()
    for window in windows:
        fitter.see(window)
    return fitter.fit(kind)


def _levels(prices: NDArray[np.float64]) -> list[list[int]]:
    """Positions in [0, 1], of shape (prices, bars), as integers 0-99."""
    levels: list[list[int]] = np.rint(prices * 99).astype(int).tolist()
    return levels


def _digits(scores: NDArray[np.float64]) -> list[str]:
    """z-scores as digits, half a deviation a step: 0 is −2.5 and below, 5 is the mean, 9 is 2 and above."""
    return [_DIGITS[digit] for digit in np.clip(np.rint(scores * 2 + 5), 0, 9).astype(int).tolist()]


def _logarithmic(value: float, *, steps_per_octave: int, smallest: float) -> str:
    if value <= smallest:
        return _TWO_DIGITS[0]
    return _TWO_DIGITS[round(min(99, steps_per_octave * math.log2(value / smallest)))]
