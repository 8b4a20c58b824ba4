"""Which windows stand or fall together: the blocks that a bootstrap draws and a cross-fit keeps whole.

Comes in: symbol, first and last bar and calendar day of every window. Goes out: `block_N`, a block number per window.
Windows that share bars see the same moves, and windows of one session the same market; counted as independent they
would make every interval too narrow (block bootstrap: Carlstein 1986; Künsch 1989).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ctxtrain.data.positions import Places, spans_of, why_no_spans
from ctxtrain.data.time_units import DAY

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Days = NDArray[np.datetime64]

# With fewer blocks than this an interval is not to be trusted: benchmarks/bench_coverage.py, docs/trust.md.
FEWEST_BLOCKS = 10
ONE_BLOCK = (
    "all windows are one block (they share bars, or are of one day), so how scores vary from block to block is not "
    "known, and intervals from single rows are too narrow"
)


@dataclass(frozen=True)
class Blocks:
    """`block_N` numbers the blocks from 0; `note` says what a block is. Too few, or no place in time, is `doubt`."""

    block_N: Ints
    note: str
    doubt: str | None

    @property
    def count(self) -> int:
        return int(self.block_N.max()) + 1

    @property
    def kept_whole(self) -> Ints:
        """What a cross-fit keeps whole: the blocks, and all windows where single rows stand in for one block."""
        return np.zeros_like(self.block_N) if self.doubt is ONE_BLOCK else self.block_N

    @property
    def trusted(self) -> bool:
        return self.doubt is None


def time_blocks(
    symbols: Sequence[str | None] | Ints, first_stamp: Ints | Floats, last_stamp: Ints | Floats, days: Days
) -> Ints:
    """Numbers from 0, of shape (windows,), the same for windows that share bars or a session, directly or by a chain.

    `first_stamp` and `last_stamp` place a window's first and last bar on one scale: windows of a symbol whose spans
    touch share bars. A session is a symbol on one of `days`. A NaN stamp and a NaT day join nothing.
    """
    rows = np.arange(len(symbols))
    symbol_N = np.unique(["" if symbol is None else symbol for symbol in symbols], return_inverse=True)[1]
    # A window starts a new chain unless its first bar lies within what the chain's windows reach.
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
    """Connected components of windows and the groups that they belong to, numbered in order of first window."""
    windows, groups = np.tile(np.arange(count), len(group_N)), np.concatenate(group_N)
    size = int(groups.max(initial=count)) + 1
    edges = coo_array((np.ones(len(groups)), (windows, groups)), shape=(size, size))
    component_N = connected_components(edges, directed=False)[1][:count]
    _, first, inverse = np.unique(component_N, return_index=True, return_inverse=True)
    numbers: Ints = np.argsort(np.argsort(first))[inverse].astype(np.int64)
    return numbers


def blocks_of(places: Places) -> Blocks:
    """The blocks of windows, by the finest rule that their place in time allows; the note says which.

    Where windows on every bar chain day to day into fewer than `FEWEST_BLOCKS` blocks, days are cut at midnight UTC:
    neighbours then share some bars, as blocks of a block bootstrap do. Where one block is left, rows stand in.
    """
    spans = spans_of({"rows": places})
    count = len(places)
    if spans is None:
        note = f"single rows, taken as independent: {_unplaced(places)}"
        return Blocks(np.arange(count, dtype=np.int64), note, _doubt(count))
    known = np.flatnonzero(spans.placed_N["rows"])
    symbols = places.symbol_N[known]
    first, last = spans.first_N["rows"][known], spans.last_N["rows"][known]
    days = np.full(len(known), np.datetime64("NaT"), dtype="datetime64[D]")
    if spans.scale == "time" and places.kind == "dates":
        days = (last // DAY).astype("datetime64[D]")
        block_N, note = time_blocks(symbols, first, last, days), "windows that share bars, or a symbol's day (UTC)"
        if block_N.max() + 1 < FEWEST_BLOCKS:
            free = np.full(len(known), np.nan)
            by_day_N = time_blocks(symbols, free, free, days)
            if by_day_N.max() > block_N.max():
                block_N, note = by_day_N, "a symbol's days, cut at midnight UTC: windows share bars from day to day"
    else:
        why = "the rows carry no time" if spans.scale == "bar_index" else "times are plain numbers, and tell no days"
        block_N, note = time_blocks(symbols, first, last, days), f"windows that share bars; {why}"
    if len(known) < count:
        note += f"; {count - len(known):,} of {count:,} rows without a place in {spans.scale} are one block"
        all_N = np.full(count, block_N.max() + 1, dtype=np.int64)
        all_N[known] = block_N
        block_N = all_N
    if block_N.max() == 0:
        note = f"single rows, for want of a second block of {note}"
        return Blocks(np.arange(count, dtype=np.int64), note, ONE_BLOCK)
    return Blocks(block_N, note, _doubt(int(block_N.max()) + 1))


def _unplaced(places: Places) -> str:
    unknown = int((~places.time.known & ~places.index.known).sum())
    if not unknown:
        return why_no_spans({"rows": places})
    which = "rows" if unknown == len(places) else f"{unknown:,} of {len(places):,} rows"
    return f"{which} cannot be placed by time or bar_index"


def _doubt(count: int) -> str | None:
    return f"{count} blocks are fewer than {FEWEST_BLOCKS}" if count < FEWEST_BLOCKS else None
