"""Inputs of the trained baselines: one row of features per window, from `ctxtrain/data/features.py` and the flags.

Input: windows with bars. Output: a table of shape (windows, features), with NaN where a window lacks a field.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.codec import Codec
from ctxtrain.data.features import window_numbers
from ctxtrain.data.parse_window import MAX_MAGNITUDE, Window

Floats = NDArray[np.float64]

LOOK_BACKS = (1, 2, 3, 5, 8, 13, 21, 29)
_NUMERIC_FIELDS = frozenset({"open", "high", "low", "close", "volume", "delta", "buy_vol", "sell_vol", "atr_14"})


def window_inputs(windows: Iterable[Window], flags: Sequence[str], features: Sequence[str]) -> Floats:
    """One row per window: shape features over look-backs, then each of the `flags`, then each row feature.

    Values are clipped to ±1e15, the limit for numbers in rows: a price near 0 makes ratios whose squares overflow.
    """
    table: Floats = np.array(
        [
            [
                *_shape_features(window),
                *(number for name in flags for number in _flag_features(window.bars.get(name))),
                *(window.features.get(name, np.nan) for name in features),
            ]
            for window in windows
        ]
    )
    return table.clip(-MAX_MAGNITUDE, MAX_MAGNITUDE)


def input_names(codec: Codec) -> tuple[list[str], list[str]]:
    """Names of the flags and of the row features that every training window has."""
    return sorted(set(codec.fields) - _NUMERIC_FIELDS), sorted(codec.features)


def _shape_features(window: Window) -> list[float]:
    """Moves, ranges, distances to extremes, volume and delta over look-backs."""
    numbers = window_numbers(window.bars)
    move = np.diff(numbers.close, prepend=numbers.open[0])
    delta = np.full(len(move), np.nan) if numbers.delta is None else numbers.delta
    atr = np.nan if numbers.atr_ratio is None else numbers.atr_ratio
    row = [numbers.range_in_bars, numbers.bar_range_share, atr, len(move), numbers.close[-1]]
    for k in LOOK_BACKS:
        top, bottom = numbers.high[-k:], numbers.low[-k:]
        row += [move[-k:].sum(), np.abs(move[-k:]).sum(), (move[-k:] > 0).mean()]
        row += [top.max() - numbers.close[-1], numbers.close[-1] - bottom.min(), top.argmax(), bottom.argmin()]
        row += [numbers.volume[-k:].mean(), (move[-k:] * numbers.volume[-k:]).sum(), delta[-k:].mean()]
    gap_up, gap_down = numbers.low[-1] - numbers.high[-3], numbers.low[-3] - numbers.high[-1]
    return [float(number) for number in (*row, gap_up, gap_down)]


def _flag_features(values: Floats | None) -> list[float]:
    """A flag now and one bar ago, its sum, and the number of bars since it was last set and since it last changed."""
    if values is None:
        return [np.nan] * 5
    set_bars, changed_bars = np.flatnonzero(values[::-1]), np.flatnonzero(np.diff(values)[::-1])
    bars_since = [float(bars[0]) if len(bars) else float(len(values)) for bars in (set_bars, changed_bars)]
    return [float(values[-1]), float(values[-2]), float(values.sum()), *bars_since]
