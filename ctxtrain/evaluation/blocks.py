"""Time blocks of dependent windows: the bootstrap weights whole blocks, and cross-fitting never splits one.

Input: symbol, first and last bar, and calendar day of each window. Output: `block_N`, a block number per window.
Windows that share bars see the same moves, and windows of one session the same market. Treated as independent, they
would make every interval too narrow (block bootstrap: Carlstein 1986; Künsch 1989).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ctxtrain.data.positions import WindowPositions, common_spans, missing_spans_reason
from ctxtrain.data.time_units import DAY

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Days = NDArray[np.datetime64]

# With fewer blocks no intervals are computed: they could not show how much other days differ (docs/trust.md).
MIN_BLOCKS = 10
ONE_BLOCK = f"all windows share bars or a day, so they are one independent period; use {MIN_BLOCKS} or more"


@dataclass(frozen=True)
class Blocks:
    """Blocks of windows: `block_N` numbers them from 0, `note` describes them.

    `doubt` is the reason why no intervals are computed from these blocks, or None.
    """

    block_N: Ints
    note: str
    doubt: str | None

    @property
    def count(self) -> int:
        return int(self.block_N.max()) + 1

    @property
    def fold_groups(self) -> Ints:
        """Groups that cross-fitting must not split: the blocks, or all windows where single rows replace one block."""
        return np.zeros_like(self.block_N) if self.doubt is ONE_BLOCK else self.block_N

    @property
    def trusted(self) -> bool:
        return self.doubt is None


def time_blocks(
    symbols: Sequence[str | None] | Ints, first_stamp: Ints | Floats, last_stamp: Ints | Floats, days: Days
) -> Ints:
    """Block numbers from 0, of shape (windows,): windows that share bars or a session, also by a chain, share a block.

    `first_stamp` and `last_stamp` are the positions of a window's first and last bar on one scale: windows of a symbol
    whose spans touch share bars. A session is a symbol on one of `days`. A NaN stamp or NaT day joins no windows.
    """
    rows = np.arange(len(symbols))
    symbol_N = np.unique(["" if symbol is None else symbol for symbol in symbols], return_inverse=True)[1]
    # A window starts a new chain unless its first bar lies within the span of the chain.
    order = np.lexsort((first_stamp, symbol_N))
    order = order[~np.isnan(first_stamp[order]) & ~np.isnan(last_stamp[order])]
    chain_N = len(rows) + rows
    reach, chain, symbol = None, 0, -1
    for row in order:
        if symbol_N[row] != symbol or first_stamp[row] > reach:
            reach, chain, symbol = last_stamp[row], int(chain_N[row]), symbol_N[row]
        chain_N[row], reach = chain, max(reach, last_stamp[row])
    session_N = 2 * len(rows) + rows
    known = np.flatnonzero(~np.isnat(days))
    if len(known):
        pairs = np.stack([symbol_N[known], days[known].astype("datetime64[D]").astype(np.int64)])
        session_N[known] = 2 * len(rows) + np.unique(pairs, axis=1, return_inverse=True)[1]
    return _components(len(rows), chain_N, session_N)


def _components(count: int, *group_N: Ints) -> Ints:
    """Connected components of windows that share a group, numbered in order of their first window."""
    windows, groups = np.tile(np.arange(count), len(group_N)), np.concatenate(group_N)
    size = int(groups.max(initial=count)) + 1
    edges = coo_array((np.ones(len(groups)), (windows, groups)), shape=(size, size))
    component_N = connected_components(edges, directed=False)[1][:count]
    _, first, inverse = np.unique(component_N, return_index=True, return_inverse=True)
    numbers: Ints = np.argsort(np.argsort(first))[inverse].astype(np.int64)
    return numbers


def assign_blocks(positions: WindowPositions) -> Blocks:
    """The blocks of windows, by the finest rule that their positions in time allow; the note says which.

    Windows on every bar can chain days into fewer than `MIN_BLOCKS` blocks. Days are then cut at midnight UTC, and
    adjacent days share some bars, as in any block bootstrap. A single remaining block is replaced by single rows.
    """
    spans = common_spans({"rows": positions})
    count = len(positions)
    if spans is None:
        note = f"single rows, treated as independent: {_no_positions_reason(positions)}"
        return Blocks(np.arange(count, dtype=np.int64), note, _few_blocks_reason(count))
    known = np.flatnonzero(spans.placed_N["rows"])
    symbols = positions.symbol_N[known]
    first, last = spans.first_N["rows"][known], spans.last_N["rows"][known]
    days = np.full(len(known), np.datetime64("NaT"), dtype="datetime64[D]")
    if spans.scale == "time" and positions.kind == "dates":
        days = (last // DAY).astype("datetime64[D]")
        block_N, note = time_blocks(symbols, first, last, days), "windows that share bars, or a symbol's day (UTC)"
        if block_N.max() + 1 < MIN_BLOCKS:
            unknown = np.full(len(known), np.nan)
            by_day_N = time_blocks(symbols, unknown, unknown, days)
            if by_day_N.max() > block_N.max():
                block_N, note = by_day_N, "a symbol's days, cut at midnight UTC: windows of adjacent days share bars"
    else:
        why = "the rows have no time" if spans.scale == "bar_index" else "times are plain numbers without days"
        block_N, note = time_blocks(symbols, first, last, days), f"windows that share bars; {why}"
    if len(known) < count:
        note += f"; {count - len(known):,} of {count:,} rows without a known {spans.scale} are one block"
        all_N = np.full(count, block_N.max() + 1, dtype=np.int64)
        all_N[known] = block_N
        block_N = all_N
    if block_N.max() == 0:
        note = f"single rows, because there is only one block of {note}"
        return Blocks(np.arange(count, dtype=np.int64), note, ONE_BLOCK)
    return Blocks(block_N, note, _few_blocks_reason(int(block_N.max()) + 1))


def _no_positions_reason(positions: WindowPositions) -> str:
    unknown = int((~positions.time.known & ~positions.index.known).sum())
    if not unknown:
        return missing_spans_reason({"rows": positions})
    which = "rows" if unknown == len(positions) else f"{unknown:,} of {len(positions):,} rows"
    return f"{which} have no usable time or bar_index"


def _few_blocks_reason(count: int) -> str | None:
    if count >= MIN_BLOCKS:
        return None
    periods = "one independent period" if count == 1 else f"{count} independent periods"
    return f"the windows cover {periods}; use {MIN_BLOCKS} or more"
