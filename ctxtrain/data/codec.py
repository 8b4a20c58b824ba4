"""Window → text for the tokenizer, identical in training, evaluation and prediction.

Input: a `Window`. Output: one line of text. `compact` writes quantised integers; `json` writes the input fields
unchanged, for comparison; `text` passes the prompt of a text row through. A fitted codec is saved as `codec.json`,
which fixes kind, version, fields and scales.

The compact text of a bar is `marks` + `HHLLCCVD`; bars are oldest first, separated by a blank:

    HH LL CC   high, low, close: 00 = lowest low of the window … 99 = its highest high
    V  D       volume (log) and delta: z-score within the window in half deviations, 5 = the mean; if the rows have no
               volume, V is 5; if they have no delta, D is -
    marks      one letter per pulse on its bar; one letter, or letter + digit, per state, direction or level where it
               changes, and all of them on the first bar and on the event bar; the same for each field of `levels.py`,
               with a letter of `LEVEL_LETTERS` in the order of the fields; X, V or Y where a price, the volume or
               the delta is an outlier that the scale leaves out (`outliers.py`); b or s on the event bar if the delta
               of the window is one-sided, bought or sold, which its z-scores cannot express; O + two digits for an
               open away from the previous close

The text ends in `r` (range of the window in mean bar ranges), `a` (mean bar range as a share of the price), `t` (atr_14
in mean bar ranges), each on a logarithmic scale, one `z` for each field of `levels.py` that is a number or a count and
one per number of `features` (robust z-score over the training rows), one `p` per word of `features`, and `?`, the token
whose hidden state the classifier reads. A row without bars has only this end: its numbers, its words, and `?`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self, cast

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ctxtrain.config.value_types import FieldKind
from ctxtrain.data.features import WindowNumbers, window_numbers
from ctxtrain.data.levels import FeatureScale, Level, WordList, half_deviations
from ctxtrain.data.parse_window import Kind, Window
from ctxtrain.data.row_schema import BAR_FIELDS
from ctxtrain.errors import MAX_FAULTS_SHOWN, DataError, short_repr

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]

END = "?"
# One letter per pulse, written on every bar where the pulse is true.
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
    "ext_bos_up": "E",
    "ext_bos_down": "e",
    "int_bos_up": "I",
    "int_bos_down": "i",
    "int_choch_up": "Z",
    "int_choch_down": "y",
    "mgann_leg_first_fvg": "T",
}
# Letters for each value of a state, which holds until it changes.
STATES = {
    "ext_dir": {-1: "D", 0: "N", 1: "U"},
    "int_dir": {-1: "d", 0: "n", 1: "u"},
    "fvg_up": {0: "f", 1: "F"},
    "fvg_down": {0: "g", 1: "G"},
    "pb_wave_strength_ok": {0: "w", 1: "W"},
    "mgann_leg_index": {0: "m", **{leg: f"M{leg - 1}" for leg in range(1, 11)}},
    "wave_strength": {tenth: f"S{tenth}" for tenth in range(10)},
    "htf_dir": {-1: "k", 0: "o", 1: "h"},
}
LEVEL_LETTERS = "Acjlqvx!#$%&*+/:;<=>@^_~"
WORD_LETTER = "p"
OUTLIER_LETTERS = {"price": "X", "volume": "V", "delta": "Y"}
SIDE_LETTERS = {-1: "s", 1: "b"}
MIN_OPEN_GAP = 3  # from the previous close, in 1/99 of the window range; smaller gaps are not written
RENDER_CHUNK = 500  # windows rendered together, in one array
_TWO_DIGITS = [f"{value:02d}" for value in range(100)]
# The same as bytes; and, by state, the bytes of its values in ascending order.
_TWO_BYTES = np.array([list(digits.encode()) for digits in _TWO_DIGITS], dtype=np.uint8)
_STATE_BYTES = {
    name: np.array([list(written[value].encode().ljust(2, b"\0")) for value in sorted(written)], dtype=np.uint8)
    for name, written in STATES.items()
}


class Codec(BaseModel):
    """A fitted codec; `render` depends on these fields alone.

    `own_fields` are all bar fields that the user declared, also those that some training rows lack: a row to be
    predicted is parsed as the training rows were.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["compact", "json", "text"]
    version: Literal[1] = 1
    fields: list[str]
    levels: dict[str, Level] = Field(default_factory=dict, max_length=len(LEVEL_LETTERS))
    features: dict[str, FeatureScale]
    feature_words: dict[str, WordList] = Field(default_factory=dict)
    own_fields: dict[str, FieldKind] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if len(set(self.fields)) < len(self.fields) or not set(self.fields) <= {*BAR_FIELDS, *self.levels}:
            raise ValueError(f"fields must be distinct names of levels, or out of: {', '.join(BAR_FIELDS)}")
        if not set(self.levels) <= set(self.fields):
            raise ValueError("levels must be among the fields")
        return self

    @property
    def rows(self) -> Kind:
        """The kind of rows that this codec renders."""
        return "text" if self.kind == "text" else "window" if self.fields else "features"

    def render(self, window: Window) -> str:
        """Text of one window. Raises DataError if the window lacks a field that the codec needs."""
        return next(self.render_all([window]))

    def render_all(self, windows: Iterable[Window]) -> Iterator[str]:
        """Texts of windows, in order, each equal to that of `render`.

        Raises one DataError at the end, with all windows that could not be rendered.
        """
        faults: list[str] = []
        total, stream = 0, iter(windows)
        while chunk := list(islice(stream, RENDER_CHUNK)):
            reasons = [self.fault(window) for window in chunk]
            total += sum(reason is not None for reason in reasons)
            faults += [f"{window.location}: {reason}" for window, reason in zip(chunk, reasons, strict=True) if reason]
            del faults[MAX_FAULTS_SHOWN:]
            yield from self._render_chunk([window for window, reason in zip(chunk, reasons, strict=True) if not reason])
        if total:
            raise DataError(faults, total=total)

    def fault(self, window: Window) -> str | None:
        """Why the window cannot be rendered, or None."""
        if window.kind != self.rows:
            return f"the model was trained on {self.rows} rows, got a {window.kind} row"
        kinds: list[tuple[Mapping[str, Any], Mapping[str, Any], str]] = [
            (self.features, window.feature_words, "number"),
            (self.feature_words, window.features, "word"),
        ]
        for known, others, kind in kinds:
            if wrong := [name for name in known if name in others]:
                rule = f"features.{wrong[0]} must be a {kind}, as in the training rows"
                return f"{rule}, got {short_repr(others[wrong[0]])}"
        lacking = [name for name in self.fields if name not in window.bars and name not in window.bar_words]
        lacking += [f"features.{name}" for name in self.features if name not in window.features]
        lacking += [f"features.{name}" for name in self.feature_words if name not in window.feature_words]
        if lacking:
            return (
                f"lacks {', '.join(lacking)}, which the model was trained on; "
                f"add it to {'every bar' if self.rows == 'window' else 'the features'}, or train on rows without it"
            )
        return None

    def unseen_words(self, window: Window) -> list[str]:
        """The categories of a window whose word is not in the codec's list, and so is read as another word."""
        unseen = [
            f"features.{name}"
            for name, known in self.feature_words.items()
            if window.feature_words.get(name) not in known.words
        ]
        for name, level in self.levels.items():
            if level.words is not None and not set(window.bar_words.get(name, ())) <= set(level.words.words):
                unseen.append(name)
        return unseen

    def save(self, path: Path) -> None:
        path.write_bytes(self.to_json())

    def to_json(self) -> bytes:
        return orjson.dumps(self.model_dump(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)

    @classmethod
    def load(cls, path: Path) -> Codec:
        """Read `codec.json`. Raises DataError if the file is no codec of a known version."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            reasons = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise DataError(
                f"{path}: not a codec that this version can read ({reasons}). Export the model again."
            ) from None

    def _render_chunk(self, windows: list[Window]) -> list[str]:
        if self.kind == "text":
            return [cast(str, window.text) for window in windows]
        if self.kind == "json":
            return [self._render_json(window) for window in windows]
        indices_by_length = defaultdict(list)
        for index, window in enumerate(windows):
            indices_by_length[window.length].append(index)
        texts = [""] * len(windows)
        for length, indices in indices_by_length.items():
            chosen = [windows[index] for index in indices]
            rendered = self._render_compact(chosen) if length else [f"{tail}{END}" for tail in self._tails(chosen)]
            for index, text in zip(indices, rendered, strict=True):
                texts[index] = text
        return texts

    def _render_json(self, window: Window) -> str:
        columns = [
            window.bars[name].tolist() if name in window.bars else window.bar_words[name] for name in self.fields
        ]
        bars = [dict(zip(self.fields, values, strict=True)) for values in zip(*columns, strict=True)]
        features: dict[str, Any] = {name: window.features[name] for name in self.features}
        features |= {name: window.feature_words[name] for name in self.feature_words}
        return orjson.dumps({"bars": bars, "features": features}).decode()

    def _render_compact(self, windows: list[Window]) -> list[str]:
        """Texts of W windows of L bars each.

        Every possible mark of a bar has a fixed slot among the S bytes of the bar; a 0 byte means that it is not
        written.
        """
        names = [name for name in self.fields if not self._is_category(name)]
        table = np.concatenate([window.bars[name] for name in names for window in windows])
        bars = dict(zip(names, table.reshape(len(names), len(windows), -1), strict=True))
        numbers = window_numbers(bars)
        opens, *levels = np.rint(np.array([numbers.open, numbers.high, numbers.low, numbers.close]) * 99).astype(int)
        volume = np.full_like(opens, ord("5")) if numbers.volume is None else half_deviations(numbers.volume)
        delta = np.full_like(opens, ord("-")) if numbers.delta is None else half_deviations(numbers.delta)
        blank = np.full_like(opens, ord(" "))
        slots = [
            *self._marks(bars),
            *self._level_marks(bars, windows),
            *_outlier_and_side_marks(numbers),
            _open_gaps(opens, levels[-1]),
            *(_TWO_BYTES[level] for level in levels),
            np.stack([volume, delta, blank], axis=-1),
        ]
        bytes_WLS = np.concatenate(slots, axis=-1, dtype=np.uint8, casting="unsafe")
        text = bytes_WLS[bytes_WLS != 0].tobytes().decode()
        ends = np.count_nonzero(bytes_WLS, axis=(1, 2)).cumsum().tolist()
        tails = self._tails(windows, numbers)
        return [f"{text[start:end]}{tail}{END}" for start, end, tail in zip([0, *ends], ends, tails, strict=False)]

    def _marks(self, bars: dict[str, Floats]) -> Iterator[Bytes]:
        """Bytes of the states, two each, and of the pulses, one each."""
        for name, bytes_of_value in _STATE_BYTES.items():
            if name in self.fields and name not in self.levels:
                values = np.minimum(bars[name] // 10, 9) if name == "wave_strength" else bars[name]
                yield bytes_of_value[values.astype(int) - min(STATES[name])] * _is_written(values)[..., None]
        for name, letter in PULSES.items():
            if name in self.fields:
                yield ((bars[name] != 0) * np.uint8(ord(letter)))[..., None]

    def _level_marks(self, bars: dict[str, Floats], windows: list[Window]) -> Iterator[Bytes]:
        """Bytes of the fields of `levels`, two each: a letter and the mark of the value."""
        for letter, (name, level) in zip(LEVEL_LETTERS, self.levels.items(), strict=False):
            if level.words is None:
                marks = level.marks(bars[name])
            else:
                text = "".join(level.words.marks(window.bar_words[name]) for window in windows)
                marks = np.frombuffer(text.encode(), dtype=np.uint8).reshape(len(windows), -1)
            yield np.stack([np.full_like(marks, ord(letter)), marks], axis=-1) * _is_written(marks)[..., None]

    def _is_category(self, name: str) -> bool:
        return name in self.levels and self.levels[name].words is not None

    def _tails(self, windows: list[Window], numbers: WindowNumbers | None = None) -> Iterator[str]:
        """What follows the bars of each window; `numbers` is None for rows without bars."""
        columns = []
        if numbers is not None:
            columns.append([f"r{_logarithmic(value, 16, smallest=1.0)}" for value in numbers.range_in_bars.tolist()])
            columns.append([f"a{_logarithmic(value, 6, smallest=1e-6)}" for value in numbers.bar_range_share.tolist()])
            if numbers.atr_ratio is not None:
                columns.append([f"t{_logarithmic(value, 16, smallest=0.125)}" for value in numbers.atr_ratio.tolist()])
        for name, level in self.levels.items():
            if level.scale is not None:
                columns.append([_score_digits(level.score(float(window.bars[name][-1]))) for window in windows])
        for name, scale in self.features.items():
            columns.append([_score_digits((window.features[name] - scale.centre) / scale.spread) for window in windows])
        for name, known in self.feature_words.items():
            columns.append([f"{WORD_LETTER}{known.marks([window.feature_words[name]])}" for window in windows])
        return map("".join, zip(*columns, strict=True))


def _outlier_and_side_marks(numbers: WindowNumbers) -> Iterator[Bytes]:
    """Bytes that mark outliers and a one-sided delta; nothing if no window has any."""
    for name, is_outlier in numbers.outliers.items():
        if is_outlier.any():
            yield (is_outlier * np.uint8(ord(OUTLIER_LETTERS[name])))[..., None]
    if numbers.side.any():
        letters = np.zeros((*numbers.close.shape, 1), dtype=np.uint8)
        for side, letter in SIDE_LETTERS.items():
            letters[numbers.side == side, -1] = ord(letter)
        yield letters


def _open_gaps(opens: Ints, closes: Ints) -> Bytes:
    """Bytes of each open that is away from the previous close."""
    is_away = np.zeros(opens.shape, dtype=np.bool_)
    np.greater_equal(abs(opens[:, 1:] - closes[:, :-1]), MIN_OPEN_GAP, out=is_away[:, 1:])
    letter = np.full((*opens.shape, 1), ord("O"), dtype=np.uint8)
    return np.concatenate([letter, _TWO_BYTES[opens]], axis=-1) * is_away[..., None]


def _is_written(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a state of shape (W, L) is written: where it changes, on the first bar and on the event bar."""
    is_written = np.ones(values.shape, dtype=np.bool_)
    np.not_equal(values[:, 1:-1], values[:, :-2], out=is_written[:, 1:-1])
    return is_written


def _score_digits(score: float) -> str:
    """A z-score as `z` and two digits: 50 is the centre, 99 is 4.9 deviations above it."""
    return f"z{_TWO_DIGITS[round(min(99, max(0, score * 10 + 50)))]}"


def _logarithmic(value: float, steps_per_octave: int, *, smallest: float) -> str:
    if value <= smallest:
        return _TWO_DIGITS[0]
    return _TWO_DIGITS[round(min(99, steps_per_octave * math.log2(value / smallest)))]
