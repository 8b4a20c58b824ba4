"""Inputs of the trained baselines: one row of features per window, from `ctxtrain/data/features.py` and the flags.

Input: windows, with bars or features alone. Output: a table of shape (windows, features), with NaN where a window lacks
a field.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.codec import Codec
from ctxtrain.data.features import window_numbers
from ctxtrain.data.parse_window import Window
from ctxtrain.data.row_schema import MAX_MAGNITUDE, MEASURES

Floats = NDArray[np.float64]

LOOK_BACKS = (1, 2, 3, 5, 8, 13, 21, 29)


def window_inputs(windows: Iterable[Window], codec: Codec) -> Floats:
    """One row per window: shape features over look-backs, each other bar field, each row feature, each known word.

    Values are clipped to ±1e15, the limit for numbers in rows: a price near 0 makes ratios whose squares overflow.
    """
    numbers = [name for name, level in codec.levels.items() if level.scale is not None]
    words = {name: level.words.words for name, level in codec.levels.items() if level.words is not None}
    flags = sorted(set(codec.fields) - MEASURES - {*numbers, *words})
    flags += ["wave_strength"] * ("wave_strength" in codec.fields and "wave_strength" not in numbers)
    table: Floats = np.array(
        [
            [
                *(_shape_features(window) if codec.fields else ()),
                *(number for name in sorted(flags) for number in _flag_features(window.bars.get(name))),
                *(number for name in numbers for number in _number_features(window.bars.get(name))),
                *(float(word == window.bar_words[name][-1]) for name, known in words.items() for word in known),
                *(window.features.get(name, np.nan) for name in sorted(codec.features)),
                *(
                    float(word == window.feature_words[name])
                    for name, known in codec.feature_words.items()
                    for word in known.words
                ),
            ]
            for window in windows
        ]
    )
    return table.clip(-MAX_MAGNITUDE, MAX_MAGNITUDE)


def _shape_features(window: Window) -> list[float]:
    """Moves, ranges, distances to extremes, volume and delta over look-backs."""
    numbers = window_numbers(window.bars)
    move = np.diff(numbers.close, prepend=numbers.open[0])
    volume, delta = (
        np.full(len(move), np.nan) if values is None else values for values in (numbers.volume, numbers.delta)
    )
    atr = np.nan if numbers.atr_ratio is None else numbers.atr_ratio
    row = [numbers.range_in_bars, numbers.bar_range_share, atr, len(move), numbers.close[-1]]
    for k in LOOK_BACKS:
        top, bottom = numbers.high[-k:], numbers.low[-k:]
        row += [move[-k:].sum(), np.abs(move[-k:]).sum(), (move[-k:] > 0).mean()]
        row += [top.max() - numbers.close[-1], numbers.close[-1] - bottom.min(), top.argmax(), bottom.argmin()]
        row += [volume[-k:].mean(), (move[-k:] * volume[-k:]).sum(), delta[-k:].mean()]
    gap_up, gap_down = numbers.low[-1] - numbers.high[-3], numbers.low[-3] - numbers.high[-1]
    return [float(number) for number in (*row, gap_up, gap_down)]


def _number_features(values: Floats | None) -> list[float]:
    """A number now and one bar ago, its mean, smallest and largest value."""
    if values is None:
        return [np.nan] * 5
    return [float(number) for number in (values[-1], values[-2], values.mean(), values.min(), values.max())]


def _flag_features(values: Floats | None) -> list[float]:
    """A flag now and one bar ago, its sum, and the number of bars since it was last set and since it last changed."""
    if values is None:
        return [np.nan] * 5
    set_bars, changed_bars = np.flatnonzero(values[::-1]), np.flatnonzero(np.diff(values)[::-1])
    bars_since = [float(bars[0]) if len(bars) else float(len(values)) for bars in (set_bars, changed_bars)]
    return [float(values[-1]), float(values[-2]), float(values.sum()), *bars_since]
