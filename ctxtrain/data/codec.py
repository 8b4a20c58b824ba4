"""Window → text for the tokenizer, identical in training, evaluation and prediction.

Input: a `Window`. Output: one line of text. `compact` writes quantised integers; `json` writes the input fields
unchanged, for comparison; `text` passes the prompt of a text row through. A fitted codec is saved as `codec.json`,
which fixes kind, version, fields and scales.

The compact text of a bar is `marks` + `HHLLCCVD`; bars are oldest first, separated by a blank:

    HH LL CC   high, low, close: 00 = lowest low of the window … 99 = its highest high
    V  D       volume (log) and delta: z-score within the window in half deviations, 5 = the mean; D is - if the rows
               have no delta
    marks      one letter per pulse on its bar; one letter, or letter + digit, per state, direction or level where it
               changes, and all of them on the first bar and on the event bar; X, V or Y where a price, the volume or
               the delta is an outlier that the scale leaves out (`outliers.py`); b or s on the event bar if the delta
               of the window is one-sided, bought or sold, which its z-scores cannot express; O + two digits for an
               open away from the previous close

The text ends in `r` (range of the window in mean bar ranges), `a` (mean bar range as a share of the price), `t` (atr_14
in mean bar ranges), each on a logarithmic scale, one `z` per entry of `features` (robust z-score over the training
rows), and `?`, the token whose hidden state the classifier reads.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal, cast

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ctxtrain.data.columns import DiskColumn
from ctxtrain.data.features import WindowNumbers, window_numbers
from ctxtrain.data.outliers import REL_TOL, compress_outliers
from ctxtrain.data.parse_window import BAR_FIELDS, MAX_MAGNITUDE, Window
from ctxtrain.errors import MAX_FAULTS_SHOWN, DataError

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
}
# Letters for each value of a state, which holds until it changes.
STATES = {
    "ext_dir": {-1: "D", 0: "N", 1: "U"},
    "int_dir": {-1: "d", 0: "n", 1: "u"},
    "fvg_up": {0: "f", 1: "F"},
    "fvg_down": {0: "g", 1: "G"},
    "pb_wave_strength_ok": {0: "w", 1: "W"},
    "mgann_leg_index": {leg: f"M{leg - 1}" for leg in range(1, 11)},
    "wave_strength": {tenth: f"S{tenth}" for tenth in range(10)},
}
OUTLIER_LETTERS = {"price": "X", "volume": "V", "delta": "Y"}
FEATURE_OUTLIER = 100.0  # in typical deviations from the median
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


class FeatureScale(BaseModel):
    """Robust location and spread of one entry of `features` over the training rows."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    centre: float = Field(ge=-MAX_MAGNITUDE, le=MAX_MAGNITUDE)
    spread: float = Field(gt=0, le=2 * MAX_MAGNITUDE)


def _check_bar_fields(fields: list[str]) -> list[str]:
    if len(set(fields)) < len(fields) or not set(fields) <= set(BAR_FIELDS):
        raise ValueError(f"must be distinct bar fields out of: {', '.join(BAR_FIELDS)}")
    return fields


class Codec(BaseModel):
    """A fitted codec; `render` depends on these fields alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["compact", "json", "text"]
    version: Literal[1] = 1
    fields: Annotated[list[str], AfterValidator(_check_bar_fields)]
    features: dict[str, FeatureScale]

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
        if (window.text is not None) != (self.kind == "text"):
            expected, actual = ("text", "window") if self.kind == "text" else ("window", "text")
            return f"the model was trained on {expected} rows, got a {actual} row"
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
            indices_by_length[len(window.bars["close"])].append(index)
        texts = [""] * len(windows)
        for indices in indices_by_length.values():
            rendered = self._render_compact([windows[index] for index in indices])
            for index, text in zip(indices, rendered, strict=True):
                texts[index] = text
        return texts

    def _render_json(self, window: Window) -> str:
        columns = [window.bars[name].tolist() for name in self.fields]
        bars = [dict(zip(self.fields, values, strict=True)) for values in zip(*columns, strict=True)]
        features = {name: window.features[name] for name in self.features}
        return orjson.dumps({"bars": bars, "features": features}).decode()

    def _render_compact(self, windows: list[Window]) -> list[str]:
        """Texts of W windows of L bars each.

        Every possible mark of a bar has a fixed slot among the S bytes of the bar; a 0 byte means that it is not
        written.
        """
        names = list(dict.fromkeys(("open", "high", "low", "close", "volume", *self.fields)))
        table = np.concatenate([window.bars[name] for name in names for window in windows])
        bars = dict(zip(names, table.reshape(len(names), len(windows), -1), strict=True))
        numbers = window_numbers(bars)
        opens, *levels = np.rint(np.array([numbers.open, numbers.high, numbers.low, numbers.close]) * 99).astype(int)
        delta = np.full_like(opens, ord("-")) if numbers.delta is None else _digits(numbers.delta)
        blank = np.full_like(opens, ord(" "))
        slots = [
            *self._marks(bars),
            *_outlier_and_side_marks(numbers),
            _open_gaps(opens, levels[-1]),
            *(_TWO_BYTES[level] for level in levels),
            np.stack([_digits(numbers.volume), delta, blank], axis=-1),
        ]
        bytes_WLS = np.concatenate(slots, axis=-1, dtype=np.uint8, casting="unsafe")
        text = bytes_WLS[bytes_WLS != 0].tobytes().decode()
        ends = np.count_nonzero(bytes_WLS, axis=(1, 2)).cumsum().tolist()
        tails = self._tails(windows, numbers)
        return [f"{text[start:end]}{tail}{END}" for start, end, tail in zip([0, *ends], ends, tails, strict=False)]

    def _marks(self, bars: dict[str, Floats]) -> Iterator[Bytes]:
        """Bytes of the states, two each, and of the pulses, one each."""
        for name, bytes_of_value in _STATE_BYTES.items():
            if name in self.fields:
                values = np.minimum(bars[name] // 10, 9) if name == "wave_strength" else bars[name]
                # All states are written on the first bar and on the event bar.
                is_written = np.ones(values.shape, dtype=np.bool_)
                np.not_equal(values[:, 1:-1], values[:, :-2], out=is_written[:, 1:-1])
                yield bytes_of_value[values.astype(int) - min(STATES[name])] * is_written[..., None]
        for name, letter in PULSES.items():
            if name in self.fields:
                yield ((bars[name] != 0) * np.uint8(ord(letter)))[..., None]

    def _tails(self, windows: list[Window], numbers: WindowNumbers) -> Iterator[str]:
        columns = [
            [f"r{_logarithmic(value, 16, smallest=1.0)}" for value in numbers.range_in_bars.tolist()],
            [f"a{_logarithmic(value, 6, smallest=1e-6)}" for value in numbers.bar_range_share.tolist()],
        ]
        if numbers.atr_ratio is not None:
            columns.append([f"t{_logarithmic(value, 16, smallest=0.125)}" for value in numbers.atr_ratio.tolist()])
        for name, scale in self.features.items():
            scores = [(window.features[name] - scale.centre) / scale.spread for window in windows]
            columns.append([f"z{_TWO_DIGITS[round(min(99, max(0, score * 10 + 50)))]}" for score in scores])
        return map("".join, zip(*columns, strict=True))


class CodecFitter:
    """Collects statistics of windows; fixes the fields that all of them have and the scale of each `features` entry."""

    def __init__(self) -> None:
        self.windows = 0
        self.is_text = False
        self.counts: Counter[str] = Counter()
        self._values: dict[str, DiskColumn] = {}

    def add(self, window: Window) -> None:
        self.windows += 1
        self.is_text = window.text is not None
        self.counts.update(window.bars.keys())
        self.counts.update(f"features.{name}" for name in window.features)
        for name, value in window.features.items():
            if name not in self._values:
                self._values[name] = DiskColumn("f8")
            self._values[name].append(value)

    def partial_fields(self) -> dict[str, int]:
        """Fields and features that only some windows have, with the number of windows that have them."""
        return {name: count for name, count in sorted(self.counts.items()) if count < self.windows}

    def fit(self, kind: Literal["compact", "json"]) -> Codec:
        """The codec for the windows added so far. It leaves out every field that some of them lack."""
        if self.is_text:
            return Codec(kind="text", fields=[], features={})
        candidates = [
            name for name in BAR_FIELDS if kind == "json" or name not in ("buy_vol", "sell_vol")
        ]  # the compact text has delta, their difference
        fields = [name for name in candidates if self.counts[name] == self.windows]
        scales = {}
        for name in sorted(self._values):
            if len(self._values[name]) == self.windows:
                values = self._values[name].array()
                low, centre, high = np.quantile(values, [0.25, 0.5, 0.75])
                scales[name] = FeatureScale(centre=float(centre), spread=_spread(values, float(high - low)))
        return Codec(kind=kind, fields=fields, features=scales)


def _spread(values: Floats, interquartile_range: float) -> float:
    """Standard deviation, estimated so that neither a few huge values nor rounding dominate; 1 if nothing varies."""
    minimum = REL_TOL * float(np.abs(values).min())
    compressed = compress_outliers(values[None], [FEATURE_OUTLIER])[0]
    # the interquartile range of a normal distribution is 1.349 standard deviations
    return next((spread for spread in (interquartile_range / 1.349, float(compressed.std())) if spread > minimum), 1.0)


def fit_codec(kind: Literal["compact", "json"], windows: Iterable[Window]) -> Codec:
    """The codec fitted to windows in memory."""
    fitter = CodecFitter()
    for window in windows:
        fitter.add(window)
    return fitter.fit(kind)


def _outlier_and_side_marks(numbers: WindowNumbers) -> Iterator[Bytes]:
    """Bytes that mark outliers and a one-sided delta; nothing if no window has any."""
    for name, is_outlier in numbers.outliers.items():
        if is_outlier.any():
            yield (is_outlier * np.uint8(ord(OUTLIER_LETTERS[name])))[..., None]
    if numbers.side.any():
        letters = np.zeros((*numbers.volume.shape, 1), dtype=np.uint8)
        for side, letter in SIDE_LETTERS.items():
            letters[numbers.side == side, -1] = ord(letter)
        yield letters


def _open_gaps(opens: Ints, closes: Ints) -> Bytes:
    """Bytes of each open that is away from the previous close."""
    is_away = np.zeros(opens.shape, dtype=np.bool_)
    np.greater_equal(abs(opens[:, 1:] - closes[:, :-1]), MIN_OPEN_GAP, out=is_away[:, 1:])
    letter = np.full((*opens.shape, 1), ord("O"), dtype=np.uint8)
    return np.concatenate([letter, _TWO_BYTES[opens]], axis=-1) * is_away[..., None]


def _digits(scores: Floats) -> Ints:
    """z-scores as digits in half deviations: 0 is −2.5 and below, 5 is the mean, 9 is 2 and above."""
    return np.clip(np.rint(scores * 2 + 5), 0, 9).astype(int) + ord("0")


def _logarithmic(value: float, steps_per_octave: int, *, smallest: float) -> str:
    if value <= smallest:
        return _TWO_DIGITS[0]
    return _TWO_DIGITS[round(min(99, steps_per_octave * math.log2(value / smallest)))]
