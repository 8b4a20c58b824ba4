"""What a trade at an event of simulated bars would have earned.

Input: the bars of a week and its events. Output: for each event the results of the long and of the short trade in R,
and the bars that they look ahead: `HORIZON`, or as many as the week has left.
"""

from __future__ import annotations

import numpy as np

from ctxtrain.bars.structure import Bars, Ints, average_true_range
from ctxtrain.bars.triple_barrier import triple_barrier

PROFIT_ATR, STOP_ATR, HORIZON = 1.5, 1, 20  # the defaults of `ctxtrain windows`
_DECIMALS = 6


def trade_events(week: Bars, events: Ints) -> list[tuple[float, float, int]]:
    """Results in R of the long and the short trade of each event, and the bars until they are closed at the latest.

    An event on the last bar of the week has no later bar: its trades are closed where they are entered, with 0 R.
    """
    opened, high, low, close = (week[name] for name in ("open", "high", "low", "close"))
    atr_T = average_true_range(high, low, close)
    horizons = np.minimum(HORIZON, len(close) - 1 - events)
    long_r, short_r = np.zeros(len(events)), np.zeros(len(events))
    for horizon in np.unique(horizons[horizons > 0]).tolist():
        places = np.flatnonzero(horizons == horizon)
        atr = atr_T[events[places]]
        found = triple_barrier(opened, high, low, close, events[places], PROFIT_ATR * atr, STOP_ATR * atr, horizon)
        long_r[places], short_r[places] = found.long.r_E, found.short.r_E
    results = (np.round(long_r, _DECIMALS).tolist(), np.round(short_r, _DECIMALS).tolist(), horizons.tolist())
    return list(zip(*results, strict=True))
