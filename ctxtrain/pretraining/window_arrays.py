"""Many windows as arrays, from which the statistics are computed.

Legend: W windows, L bars of the longest window; windows are aligned at the event, the last bar.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Table = dict[str, Floats]


@dataclass(frozen=True)
class WindowArrays:
    """Arrays of shape (W, L). `exists` marks the bars of a window; elsewhere, prices repeat the first bar's open.

    `flags` are CTX V3 flags by name, `bar_range_W` mean true ranges in window ranges. If a window has no delta or lacks
    a flag, those values are NaN at all of its bars.
    """

    open: Floats
    high: Floats
    low: Floats
    close: Floats
    volume: Floats
    delta: Floats
    exists: Bools
    flags: Table
    bar_range_W: Floats

    @property
    def returns(self) -> Floats:
        before = np.concatenate([self.open[:, :1], self.close[:, :-1]], axis=1)
        return np.where(self.exists, self.close - before, 0.0)
