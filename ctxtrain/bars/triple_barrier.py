"""Labels and outcomes of trades by the triple barrier: a profit, a stop and a horizon.

Input: arrays of prices, the events, and for each event the distances of its profit and its stop. Output: `Outcomes`.

A trade is entered at the close of the event bar. On each later bar up to the horizon:

- an open beyond the stop fills at the open, which is worse than the stop;
- an open beyond the profit, or a high beyond it, fills at the profit exactly;
- a bar that touches both barriers, and opens between them, is ambiguous: the stop counts.

A trade that reaches neither is closed at the close of the last bar of the horizon. Results are in R, multiples of the
distance of the stop. LONG is the label if the long trade reaches its profit, SHORT if the short trade does, SKIP if
neither does; if both do, the earlier one counts, and SKIP if that is the same bar.

Source: López de Prado, Advances in Financial Machine Learning (2018), section 3.4.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ctxtrain.labels import LABELS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Trades:
    """One trade per event: its result in R, the bars until its exit, and how it ended."""

    r_E: Floats
    bars_E: Ints
    won_E: Bools
    ambiguous_E: Bools


@dataclass(frozen=True)
class Outcomes:
    """The label of each event, as an index into `LABELS`, and both of its trades.

    `ambiguous_E` marks events whose label or results depend on an order of prices within a bar that is not known.
    """

    labels_E: Ints
    long: Trades
    short: Trades
    ambiguous_E: Bools


def triple_barrier(
    open_T: Floats,
    high_T: Floats,
    low_T: Floats,
    close_T: Floats,
    events_E: Ints,
    profit_E: Floats,
    stop_E: Floats,
    horizon: int,
) -> Outcomes:
    """Labels and results of the events at bars `events_E`, each with `horizon` bars after it.

    `profit_E` and `stop_E` are distances from the entry, in price, above 0.
    """
    assert horizon >= 1
    assert not len(events_E) or int(events_E.max()) + horizon < len(close_T), "an event without its horizon"
    long = _trade(open_T, high_T, low_T, close_T, events_E, profit_E, stop_E, horizon)
    # A short trade is a long one in negated prices, in which the lows are the highs.
    short = _trade(-open_T, -low_T, -high_T, -close_T, events_E, profit_E, stop_E, horizon)
    never = horizon + 1
    long_at, short_at = np.where(long.won_E, long.bars_E, never), np.where(short.won_E, short.bars_E, never)
    labels_E = np.full(len(events_E), LABELS.index("SKIP"), np.int64)
    labels_E[long_at < short_at] = LABELS.index("LONG")
    labels_E[short_at < long_at] = LABELS.index("SHORT")
    same_bar = (long_at == short_at) & long.won_E
    return Outcomes(labels_E, long, short, long.ambiguous_E | short.ambiguous_E | same_bar)


def _trade(
    open_T: Floats,
    high_T: Floats,
    low_T: Floats,
    close_T: Floats,
    events_E: Ints,
    profit_E: Floats,
    stop_E: Floats,
    horizon: int,
) -> Trades:
    """The long trade of each event. Each step looks at one more bar of the trades that are still open."""
    entry_E = close_T[events_E]
    target_E, floor_E = entry_E + profit_E, entry_E - stop_E
    r_E = (close_T[events_E + horizon] - entry_E) / stop_E
    bars_E = np.full(len(events_E), horizon, np.int64)
    won_E, ambiguous_E = np.zeros(len(events_E), np.bool_), np.zeros(len(events_E), np.bool_)
    active = np.arange(len(events_E))
    for step in range(1, horizon + 1):
        bar = events_E[active] + step
        opened, target, floor = open_T[bar], target_E[active], floor_E[active]
        beyond_stop, beyond_target = opened <= floor, opened >= target
        stopped, reached = low_T[bar] <= floor, high_T[bar] >= target
        both = stopped & reached & ~beyond_stop & ~beyond_target
        lost = (stopped & ~beyond_target) | beyond_stop
        won = reached & ~lost
        ended = lost | won
        exits = active[ended]
        bars_E[exits] = step
        won_E[active[won]] = True
        ambiguous_E[active[both]] = True
        r_E[active[won]] = profit_E[active[won]] / stop_E[active[won]]
        r_E[active[lost]] = -1.0
        r_E[active[beyond_stop]] = (opened[beyond_stop] - entry_E[active[beyond_stop]]) / stop_E[active[beyond_stop]]
        active = active[~ended]
        if not len(active):
            break
    return Trades(r_E, bars_E, won_E, ambiguous_E)
