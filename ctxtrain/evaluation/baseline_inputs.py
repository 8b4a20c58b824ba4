"""What a simple model reads of a window: one row of numbers, made from `ctxtrain/data/features.py` and the flags.

Comes in: windows with bars. Goes out: a table of shape (windows, numbers); NaN where a window lacks a field.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.codec import Codec
from ctxtrain.data.features import window_numbers
from ctxtrain.data.parse_window import LARGEST, Window

Floats = NDArray[np.float64]

LOOK_BACKS = (1, 2, 3, 5, 8, 13, 21, 29)
_NUMBERED = frozenset({"open", "high", "low", "close", "volume", "delta", "buy_vol", "sell_vol", "atr_14"})


def window_inputs(windows: Iterable[Window], flags: Sequence[str], features: Sequence[str]) -> Floats:
    """One row a window: its shape over look-backs, then each of the `flags`, then each of the row's `features`.

    A price next to 0 makes ratios that no model can square, so numbers end at 1e15, as those of a row do.
    """
    table: Floats = np.array(
        [
            [
                *_shape(window),
                *(number for name in flags for number in _flag(window.bars.get(name))),
                *(window.features.get(name, np.nan) for name in features),
            ]
            for window in windows
        ]
    )
    return table.clip(-LARGEST, LARGEST)


def input_names(codec: Codec) -> tuple[list[str], list[str]]:
    """The flags and the features that every training window carries."""
    return sorted(set(codec.fields) - _NUMBERED), sorted(codec.features)


def _shape(window: Window) -> list[float]:
    """What a trader would compute first: moves, ranges, extremes, volume and delta over look-backs."""
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


def _flag(values: Floats | None) -> list[float]:
    """A flag now and one bar ago, its sum, and the bars since it was last raised and last changed."""
    if values is None:
        return [np.nan] * 5
    raised, changed = np.flatnonzero(values[::-1]), np.flatnonzero(np.diff(values)[::-1])
    ago = [float(where[0]) if len(where) else float(len(values)) for where in (raised, changed)]
    return [float(values[-1]), float(values[-2]), float(values.sum()), *ago]
