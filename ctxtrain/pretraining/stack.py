"""Windows side by side as arrays, which the statistics are taken of.

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
class Stack:
    """Windows side by side. `exists` marks their bars; where it is false, prices repeat the first bar's open.

    `flags` are CTX V3 flags by name, `bar_range_W` mean true ranges in window ranges. What a window does not have, its
    delta or a flag, is NaN at all of its bars.
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
