"""Local times of a zone with daylight saving → UTC.

Input: local nanoseconds in the order of the market, and a zone. Output: nanoseconds in UTC. The hour that occurs twice
in autumn is resolved by order: from the bar on at which the times go back, it is the second. Where no time goes back,
the pass is chosen that leaves no gap in UTC to its neighbours. A bar in the hour that spring leaves out is a fault.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.time_units import SECOND

Ints = NDArray[np.int64]
_DAY_SECONDS = 86_400
_HOUR = 3600 * SECOND


@dataclass(frozen=True)
class Localised:
    """UTC of each bar. `missing` are the bars in an hour that does not exist, `repeated` counts those in an hour that
    occurs twice, and `guessed` those of them that fit both hours.
    """

    utc_T: Ints
    missing: Ints
    repeated: int = 0
    guessed: int = 0


def find_zone(name: str) -> ZoneInfo | None:
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):  # OSError: a folder of zones, such as America
        return None


def to_utc(local_T: Ints, zone: ZoneInfo) -> Localised:
    """`local_T` must run oldest first, except that it may go back where daylight saving ends."""
    if not len(local_T):
        return Localised(local_T, local_T)
    at_K, before_K, after_K = _transitions(zone, int(local_T.min()), int(local_T.max()))
    # From the end of a repeated or missing hour on, the offset after the change holds.
    settled_K = at_K + np.maximum(before_K, after_K)
    segment_T = np.searchsorted(settled_K, local_T, side="right")
    first = _offset_at(zone, int(at_K[0] // SECOND) - 1) if len(at_K) else _offset_at(zone, int(local_T[0]) // SECOND)
    offsets = np.concatenate(([first], after_K))
    utc_T = local_T - offsets[segment_T]
    missing, length = np.zeros(len(local_T), np.bool_), _usual_step(local_T)
    repeated = guessed = 0
    for at, before, after in zip(at_K.tolist(), before_K.tolist(), after_K.tolist(), strict=True):
        start, stop = at + min(before, after), at + max(before, after)
        inside = np.flatnonzero((local_T >= start) & (local_T < stop))
        if not len(inside):
            continue
        if after > before:
            missing[inside] = True
            continue
        repeated += len(inside)
        for first_bar, stop_bar, bars in _runs(local_T, inside, before - after):
            second, is_guess = _second_pass(local_T[first_bar:stop_bar], bars - first_bar, before, after, length)
            utc_T[second + first_bar] = local_T[second + first_bar] - after
            guessed += len(bars) if is_guess else 0
    return Localised(utc_T, np.flatnonzero(missing), repeated, guessed)


def _runs(local_T: Ints, inside: Ints, width: int) -> list[tuple[int, int, Ints]]:
    """The stretches of a file that run forward: first bar, bar after the last one, and those of `inside` within.

    A file that has its bars once more begins a stretch: its times go back by more than `width`, the repeated hour.
    """
    cuts = np.flatnonzero(np.diff(local_T) < -width) + 1
    starts, stops = [0, *cuts.tolist()], [*cuts.tolist(), len(local_T)]
    places = np.searchsorted(inside, [*starts, len(local_T)]).tolist()
    parts = [inside[first:stop] for first, stop in pairwise(places)]
    return [run for run in zip(starts, stops, parts, strict=True) if len(run[2])]


def _second_pass(local_T: Ints, inside: Ints, before: int, after: int, length: int) -> tuple[Ints, bool]:
    """The bars of a repeated hour that belong to its second pass, and whether that is a guess.

    `local_T` is one stretch, `inside` are its bars in the hour, `before` and `after` the offsets of the two passes. The
    second pass begins where the steps in UTC have the fewest gaps; equal lines are duplicates otherwise.
    """
    steps = np.diff(local_T[inside])
    back = np.flatnonzero(steps < 0) + 1
    # Where the times go back, the second pass begins; else at an equal time, before all of the bars, or after them.
    splits = back if len(back) else np.concatenate(([0], np.flatnonzero(steps == 0) + 1, [len(inside)]))
    utc_first, utc_second = local_T[inside] - before, local_T[inside] - after
    edge_before = local_T[inside[0] - 1] - before if inside[0] else None
    edge_after = local_T[inside[-1] + 1] - after if inside[-1] + 1 < len(local_T) else None

    def gaps(split: int) -> float:
        pairs = [
            (edge_before, utc_first[0] if split else utc_second[0]),
            (utc_first[-1] if split == len(inside) else utc_second[-1], edge_after),
        ]
        if 0 < split < len(inside):
            pairs.append((utc_first[split - 1], utc_second[split]))
        return sum(_gap(int(end - start), length) for start, end in pairs if None not in (start, end))

    costs = np.array([gaps(int(split)) for split in splits])
    best = splits[costs == costs.min()]
    if len(back):
        return inside[best[0] :], False
    if best[-1] == len(inside):
        return inside[:0], len(best) > 1
    return inside[best[len(best) // 2] :], len(best) > 1 and best[0] == 0


def _gap(step: int, length: int) -> float:
    """1 for a step in UTC that is longer than a bar; one that is no whole number of bars counts 0.5 more."""
    if step < 0:
        return np.inf
    return float(round(step / length) > 1) + (0.5 if step % length else 0.0)


def _usual_step(local_T: Ints) -> int:
    """The most common step forward; an hour if there is none."""
    steps = np.diff(local_T)
    lengths, counts = np.unique(steps[steps > 0], return_counts=True)
    return int(lengths[counts.argmax()]) if len(lengths) else _HOUR


def _transitions(zone: ZoneInfo, first: int, last: int) -> tuple[Ints, Ints, Ints]:
    """Instants at which the offset changes, and the offsets before and after; all in nanoseconds."""
    start, stop = first // SECOND - 2 * _DAY_SECONDS, last // SECOND + 2 * _DAY_SECONDS
    found = []
    offset = _offset_at(zone, start)
    for second in range(start + _DAY_SECONDS, stop + _DAY_SECONDS, _DAY_SECONDS):
        here = _offset_at(zone, second)
        if here != offset:
            low, high = second - _DAY_SECONDS, second
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if _offset_at(zone, middle) == offset else (low, middle)
            found.append((high * SECOND, offset, here))
            offset = here
    at, before, after = np.array(found, np.int64).reshape(-1, 3).T
    return at, before, after


def _offset_at(zone: ZoneInfo, second: int) -> int:
    """Nanoseconds that the zone is ahead of UTC at a second since 1970."""
    offset = datetime.fromtimestamp(second, UTC).astimezone(zone).utcoffset()
    assert offset is not None
    return round(offset.total_seconds()) * SECOND
