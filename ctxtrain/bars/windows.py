"""Series with events → labelled windows, and their split in time.

Input: a `Market` whose series have their flags, and the options. Output: `Windows`: the place, label and outcome of
each window, and counts of the events that were left out, by reason.

A window has `bars` bars and ends with its event. Its label may look `horizon` bars ahead. An event is left out if the
data has too few bars before or after it, if its stop or profit is below the resolution of the prices, if a gap longer
than `max_gap` bars lies in the window or the horizon, or if one of both crosses a boundary between two splits, so that
no bar is used by two splits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ctxtrain.bars.events import find_events
from ctxtrain.bars.options import TRIPLE_BARRIER, Barriers, WindowOptions
from ctxtrain.bars.series import Market, Series, missing_bars
from ctxtrain.bars.structure import average_true_range
from ctxtrain.bars.triple_barrier import triple_barrier
from ctxtrain.data.label_side import MAX_R
from ctxtrain.data.row_schema import PRICES
from ctxtrain.data.time_units import DAY
from ctxtrain.errors import ConfigError, DataError, short_repr
from ctxtrain.labels import LABELS
from ctxtrain.storage.ownership import SPLITS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

GAP_DAYS = 4  # the default of max_gap: nights, weekends and long weekends are no holes in the data
# Reasons to leave an event out, in the order in which they are tried; keys of the data card.
TOO_EARLY, TOO_LATE, GAP = "too_few_bars_before", "horizon_beyond_the_end", "gap_longer_than_max_gap"
NO_RANGE, NO_LABEL, BOUNDARY = "stop_or_profit_without_distance", "no_label", "crosses_a_split"
REASONS = (TOO_EARLY, TOO_LATE, GAP, NO_RANGE, NO_LABEL, BOUNDARY)
_REL_RESOLUTION = 1e-9  # of a price: smaller distances are rounding
_MAX_DECIMALS = 12
_LABEL_OF_NUMBER = {1.0: "LONG", -1.0: "SHORT", 0.0: "SKIP"}


@dataclass(frozen=True)
class Windows:
    """The windows in order of time. All arrays have one entry per window.

    `series_W` is an index into the series of the market, `event_W` the event bar, `split_W` an index into `SPLITS`.
    `outcomes_W3` holds the results of the long and of the short trade and the cost, in R; it has no rows without
    barriers.
    """

    series_W: Ints
    event_W: Ints
    split_W: Ints
    labels_W: Ints
    outcomes_W3: Floats
    counts: dict[str, int]
    left_out: dict[str, int]
    ambiguous: int


@dataclass(frozen=True)
class _Candidates:
    """The usable events of one series, with label, outcome and the order in time of the first and last bar they use."""

    event_E: Ints
    labels_E: Ints
    outcomes_E3: Floats
    ambiguous_E: Bools
    first_E: Ints
    last_E: Ints


def default_max_gap(bar_length: int) -> int:
    """Bars that fit into four days, at least four."""
    return max(GAP_DAYS, GAP_DAYS * DAY // bar_length)


def cut_windows(market: Market, options: WindowOptions) -> Windows:
    """Raises DataError if no event is left in a split."""
    left_out, counts = Counter[str](dict.fromkeys(REASONS, 0)), Counter[str]()
    parts = [_candidates(series, market.bar_length, options, left_out, counts) for series in market.series]
    series = np.concatenate([np.full(len(part.event_E), number) for number, part in enumerate(parts)])
    events, labels, outcomes, ambiguous, first, last = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("event_E", "labels_E", "outcomes_E3", "ambiguous_E", "first_E", "last_E")
    )
    opens = np.concatenate([one.opens_T[part.event_E] for one, part in zip(market.series, parts, strict=True)])
    order = np.lexsort((series, opens))
    if not len(order):
        raise DataError(f"no event can be used; {_describe(counts['events'], left_out)}. {_REMEDY}")
    split = _split_in_time(opens[order], options.split)
    starts = [opens[order][split >= number].min(initial=np.iinfo(np.int64).max) for number in range(1, len(SPLITS))]
    inside = np.ones(len(order), np.bool_)
    for start, number in zip(starts, range(1, len(SPLITS)), strict=True):
        # Earlier windows and their horizons end before the first event of a split, its own windows begin there.
        inside &= np.where(split < number, last[order] < start, first[order] >= start)
    left_out[BOUNDARY] = int((~inside).sum())
    kept = order[inside]
    for number, name in enumerate(SPLITS):
        if not (split[inside] == number).any():
            raise DataError(f"{name} has no windows; {_describe(counts['events'], left_out)}. {_REMEDY}")
    counts["windows"] = len(kept)
    counts["windows_that_span_a_gap"] = _spanning(market, series[kept], events[kept], options.bars)
    return Windows(
        series[kept], events[kept], split[inside], labels[kept], outcomes[kept], dict(counts), dict(left_out),
        int(ambiguous[kept].sum()),
    )  # fmt: skip


_REMEDY = "Give more bars, more events (--events), a shorter --horizon or --bars, or a larger --max-gap."


def _describe(events: int, left_out: Counter[str]) -> str:
    reasons = [f"{count:,} {reason.replace('_', ' ')}" for reason, count in left_out.items() if count]
    return f"of {events:,} events, " + (f"left out: {', '.join(reasons)}" if reasons else "all are in other splits")


def _candidates(
    series: Series, bar_length: int, options: WindowOptions, left_out: Counter[str], counts: Counter[str]
) -> _Candidates:
    horizon = options.barriers.horizon if options.barriers else 0
    events = find_events(series, options.events)
    counts["events"] += len(events)

    def keep(good: Bools, reason: str) -> None:
        nonlocal events
        left_out[reason] += int((~good).sum())
        events = events[good]

    keep(events >= options.bars - 1, TOO_EARLY)
    keep(events + horizon < len(series), TOO_LATE)
    max_gap = default_max_gap(bar_length) if options.max_gap is None else options.max_gap
    holes = _cumulated(missing_bars(series.opens_T, bar_length) > max_gap)
    keep(holes[events + horizon] == holes[events + 1 - options.bars], GAP)
    columns = series.columns
    atr_T = average_true_range(columns["high"], columns["low"], columns["close"])
    if options.barriers:
        close, atr = columns["close"][events], atr_T[events]
        least = np.maximum(_REL_RESOLUTION * np.abs(close), smallest_step(series) / 2)
        barriers = (options.barriers.stop, options.barriers.profit)
        keep(np.all([one.in_price(close, atr) >= least for one in barriers], axis=0), NO_RANGE)
    if options.label != TRIPLE_BARRIER:
        labels_T = _label_column(series, options.label)
        keep(labels_T[events] >= 0, NO_LABEL)
    labels, outcomes = np.zeros(len(events), np.int64), np.zeros((len(events), 0))
    ambiguous = np.zeros(len(events), np.bool_)
    if options.barriers:
        labels, outcomes, ambiguous = _trade(series, events, atr_T, options.barriers)
    if options.label != TRIPLE_BARRIER:
        labels = labels_T[events]
    first, last = series.opens_T[events + 1 - options.bars], series.opens_T[events + horizon]
    return _Candidates(events, labels, outcomes, ambiguous, first, last)


def smallest_step(series: Series) -> float:
    """1 of the last decimal that the prices of a series have, 0 if they have more decimals than a float keeps."""
    prices = np.concatenate([series.columns[name] for name in PRICES])
    for decimals in range(_MAX_DECIMALS + 1):
        if (np.abs(np.round(prices, decimals) - prices) <= _REL_RESOLUTION * np.abs(prices)).all():
            return float(10.0**-decimals)
    return 0.0


def _cumulated(is_hole: Bools) -> Ints:
    """The number of holes before each bar."""
    return np.concatenate(([0], np.cumsum(is_hole)))


def _trade(series: Series, events: Ints, atr_T: Floats, barriers: Barriers) -> tuple[Ints, Floats, Bools]:
    """Labels, outcomes (long, short and cost in R), and whether they are ambiguous."""
    opened, high, low, close = (series.columns[name] for name in ("open", "high", "low", "close"))
    entry, atr = close[events], atr_T[events]
    stop = barriers.stop.in_price(entry, atr)
    profit = barriers.profit.in_price(entry, atr)
    found = triple_barrier(opened, high, low, close, events, profit, stop, barriers.horizon)
    cost = barriers.cost.in_price(entry, atr) / stop
    if len(cost) and cost.max() > MAX_R:
        rule = f"cost must be at most {MAX_R:,.0f} times the stop"
        raise ConfigError(f"{rule}, got {barriers.cost.text} for a stop of {barriers.stop.text}. Correct --cost.")
    return found.labels_E, np.stack((found.long.r_E, found.short.r_E, cost), axis=1), found.ambiguous_E


def _label_column(series: Series, name: str) -> Ints:
    """Labels of a column, as indices; -1 for a null."""
    if name in series.columns:
        values = series.columns[name]
        given = [None if np.isnan(value) else _LABEL_OF_NUMBER.get(value, value) for value in values.tolist()]
    elif name in series.words:
        given = [word.strip().upper() if isinstance(word, str) else word for word in series.words[name]]
    else:
        raise ConfigError(f"label must be {TRIPLE_BARRIER} or a column of every file, got {name!r}. Correct --label.")
    wrong = next((value for value in given if value is not None and value not in LABELS), None)
    if wrong is not None:
        rule = f"the label column {name} must have LONG, SHORT and SKIP, or 1, -1 and 0"
        raise DataError(f"{series.symbol}: {rule}, got {short_repr(wrong)}. Correct the column, or name another.")
    return np.array([-1 if value is None else LABELS.index(value) for value in given], np.int64)


def _split_in_time(opens_W: Ints, shares: Sequence[int]) -> Ints:
    """The split of each window, by its place among all events; events of one time belong to the same split."""
    ends = np.cumsum(shares) * len(opens_W) // 100
    split = np.zeros(len(opens_W), np.int64)
    for number, end in enumerate(ends[:-1].tolist(), start=1):
        if end < len(opens_W):
            split[opens_W >= opens_W[end]] = number
    return split


def _spanning(market: Market, series_W: Ints, event_W: Ints, bars: int) -> int:
    """Windows within which a bar is missing."""
    spanning = 0
    for number, series in enumerate(market.series):
        gaps = _cumulated(missing_bars(series.opens_T, market.bar_length) > 0)
        events = event_W[series_W == number]
        spanning += int((gaps[events] != gaps[events + 1 - bars]).sum())
    return spanning
