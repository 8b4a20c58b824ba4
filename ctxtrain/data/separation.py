"""Keep the rows of splits apart in time: overlapping windows, purge, embargo, and the horizon of labels.

Input: a `Survey` by split, and the settings of a config. Output: a `Separation`, and the rows that it drops.

Purging drops rows that share bars with a window of a later split. An embargo also drops rows within a number of bars of
such a window (López de Prado, Advances in Financial Machine Learning, 2018, section 7.4). If labels look N bars ahead,
the label of a row depends on bars of a window that begins within N bars, so both follow from N.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.duplicates import Row
from ctxtrain.data.positions import Spans, common_spans, index_spans, missing_spans_reason
from ctxtrain.data.profile import Survey

Ints = NDArray[np.int64]
Auto = Literal["auto"]

MAX_EMBARGO = 2**60  # nanoseconds (36 years); a time plus this fits in 64 bits


@dataclass(frozen=True)
class Horizon:
    """The number of bars after an event that labels look at, 0 if not known, and where the number comes from."""

    bars: int = 0
    source: str = ""

    def __str__(self) -> str:
        return f"labels look {self.bars:,} bar{'' if self.bars == 1 else 's'} ahead ({self.source})"


@dataclass(frozen=True)
class Separation:
    """Whether rows that share bars with a later split are dropped, and also those within `embargo` bars of one."""

    horizon: Horizon
    purge: bool
    embargo: int
    notes: tuple[str, ...] = ()


def label_horizon(surveys: Mapping[str, Survey], configured: int | None = None) -> Horizon:
    """The configured number of bars, or else the largest `label_horizon` of the rows."""
    if configured is not None:
        return Horizon(configured, "data.label_horizon")
    horizons_N = np.concatenate([survey.horizons_N for survey in surveys.values()])
    given = int((horizons_N >= 0).sum())
    if not given:
        return Horizon()
    where = "of the rows" if given == len(horizons_N) else f"of the {given:,} of {len(horizons_N):,} rows that have one"
    return Horizon(int(horizons_N.max()), f"the largest label_horizon {where}")


def plan_separation(
    surveys: Mapping[str, Survey], *, purge: bool | Auto, embargo: int | Auto, configured_horizon: int | None
) -> Separation:
    """What the settings and the horizon of the labels require.

    `auto` purges if labels look ahead or an embargo is set, with the horizon as embargo. A given value is used even if
    it is too small, with a note.
    """
    horizon = label_horizon(surveys, configured_horizon)
    bars = horizon.bars if embargo == "auto" else embargo
    is_requested = purge is True or (purge == "auto" and embargo != "auto" and embargo > 0)
    notes = _horizon_notes(surveys, configured_horizon)
    if not horizon.bars:
        return Separation(horizon, is_requested, bars, tuple(notes))
    if purge is False:
        notes.append(
            f"{horizon}, but data.purge=false keeps rows whose labels depend on bars of a later split. Set "
            "data.purge=auto to drop them"
        )
        return Separation(horizon, False, bars, tuple(notes))
    if not is_requested and _spans(surveys) is None:
        notes.append(
            f"{horizon}, but rows whose labels depend on bars of a later split cannot be dropped: {_reason(surveys)}. "
            "Give every bar a time of one kind"
        )
        return Separation(horizon, False, bars, tuple(notes))
    if unmeasured := sum(_without_bar_length(survey) for survey in surveys.values()):
        notes.append(
            f"{horizon}, but {unmeasured:,} of {sum(map(len, surveys.values())):,} rows have no bars and no timeframe "
            "such as M5, so their distance to other rows is not known in bars, and they are kept. Give them a timeframe"
        )
    if bars < horizon.bars:
        notes.append(
            f"{horizon}, but data.embargo={bars} is smaller: it keeps rows whose labels depend on bars of a later "
            "split. Set data.embargo=auto"
        )
    else:
        distance = f"{bars:,} bar{'' if bars == 1 else 's'}"
        notes.append(
            f"{horizon}; rows that share bars with a later split, or are within {distance} of one, are dropped"
        )
    return Separation(horizon, True, bars, tuple(notes))


def _without_bar_length(survey: Survey) -> int:
    """The number of rows with a time whose bar length is not known."""
    time = survey.positions.time
    return int((time.known & (time.step == 0)).sum())


def overlapping(spans: Spans, name: str, others: Sequence[str], embargo: int = 0) -> tuple[Ints, list[Row]]:
    """Rows of split `name` that overlap a window of the splits `others` or are within `embargo` bars of one.

    The second result has, for each of these rows, one such window. On the scale of time, an embargo of N bars is a
    duration, N times the median bar length of the symbol, so a night or a weekend uses it up although it has no bars.
    """
    rows, partners = [], []
    for symbol in np.unique(spans.symbol_N[name][spans.placed_N[name]]).tolist():
        own_N, *other_rows = (rows_of_symbol(spans, split, symbol) for split in (name, *others))
        gap = min(MAX_EMBARGO, embargo * round(np.median(spans.bar_N[name][own_N])))
        rows_of_split = list(zip(others, other_rows, strict=True))
        first = np.concatenate([spans.first_N[split][split_rows] for split, split_rows in rows_of_split])
        last = np.concatenate([spans.last_N[split][split_rows] for split, split_rows in rows_of_split])
        split_N = np.repeat(np.arange(len(others)), [len(split_rows) for split_rows in other_rows])
        row_N = np.concatenate(other_rows)
        if not len(first):
            continue
        order = np.argsort(first, kind="stable")
        # If a window that starts before the row ends overlaps the row, then so does the one of them that ends last.
        furthest = np.maximum.accumulate(last[order])
        holder = order[np.maximum.accumulate(np.where(last[order] == furthest, np.arange(len(order)), 0))]
        before = np.searchsorted(first[order], spans.last_N[name][own_N] + gap, side="right") - 1
        hit = (before >= 0) & (furthest[before] >= spans.first_N[name][own_N] - gap)
        rows += own_N[hit].tolist()
        partners += [(others[split_N[n]], int(row_N[n])) for n in holder[before[hit]]]
    order = np.argsort(np.array(rows, dtype=np.int64), kind="stable")
    return np.array(rows, dtype=np.int64)[order], [partners[n] for n in order]


def rows_within(surveys: Mapping[str, Survey], name: str, others: Sequence[str], embargo: int) -> dict[int, Row]:
    """Rows of split `name` within `embargo` bars of a window of the splits `others`, each with one such window.

    Distances are measured in time and, if every row has a reliable one, in `bar_index`, which counts no bars in a night
    or a weekend. A row is returned if it is close by either. Without a common scale there are none.
    """
    positions = {split: survey.positions for split, survey in surveys.items()}
    scales = [common_spans(positions), index_spans(positions) if embargo else None]
    found: dict[int, Row] = {}
    for spans in filter(None, scales):
        rows, partners = overlapping(spans, name, others, embargo)
        found |= dict(zip(rows.tolist(), partners, strict=True))
    return dict(sorted(found.items()))


def purged_rows(surveys: Mapping[str, Survey], embargo: int) -> dict[str, Ints]:
    """Rows to drop, by split: rows that overlap a row of a later split, or are within `embargo` bars of one.

    "Later" refers to the order of `surveys`. Rows without a position may overlap too, so they are also dropped. Raises
    ValueError if the splits have no common scale of positions.
    """
    spans = _spans(surveys)
    if spans is None:
        raise ValueError(_reason(surveys))
    splits = list(surveys)
    return {
        name: np.union1d(
            np.array(list(rows_within(surveys, name, splits[place + 1 :], embargo)), dtype=np.int64),
            np.flatnonzero(~spans.placed_N[name]),
        )
        for place, name in enumerate(splits[:-1])
    }


def count_unpositioned(spans: Spans) -> dict[str, int]:
    """By split, the number of rows without a position on the scale; splits without such rows are omitted."""
    return {name: int((~placed_N).sum()) for name, placed_N in spans.placed_N.items() if not placed_N.all()}


def rows_of_symbol(spans: Spans, name: str, symbol: int) -> Ints:
    """The rows of a split that have this symbol and a position."""
    return np.flatnonzero((spans.symbol_N[name] == symbol) & spans.placed_N[name])


def _spans(surveys: Mapping[str, Survey]) -> Spans | None:
    return common_spans({name: survey.positions for name, survey in surveys.items()})


def _reason(surveys: Mapping[str, Survey]) -> str:
    return missing_spans_reason({name: survey.positions for name, survey in surveys.items()})


def _horizon_notes(surveys: Mapping[str, Survey], configured: int | None) -> list[str]:
    """A note if a row's `label_horizon` is larger than the configured one."""
    largest = label_horizon(surveys).bars
    if configured is None or largest <= configured:
        return []
    return [f"data.label_horizon={configured} is smaller than the largest label_horizon of the rows, {largest:,}"]
