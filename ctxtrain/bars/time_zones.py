"""Local times of a zone with daylight saving → UTC.

Input: local nanoseconds in the order of the market, and a zone. Output: nanoseconds in UTC. The hour that occurs twice
in autumn is resolved by order: from the bar on at which the times go back, it is the second. If the hour occurs only
once in a file, it is the one that leaves no gap to its neighbours. A bar in the hour that spring leaves out is a fault.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.time_units import SECOND

Ints = NDArray[np.int64]
_DAY_SECONDS = 86_400


@dataclass(frozen=True)
class Localised:
    """UTC of each bar. `missing` are the bars in an hour that does not exist, `repeated` counts those in an hour that
    occurs twice, and `guessed` those of them whose hour the file has only once.
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
    missing = np.zeros(len(local_T), np.bool_)
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
        second, was_guessed = _second_pass(local_T, inside)
        utc_T[second] = local_T[second] - after
        guessed += was_guessed
    return Localised(utc_T, np.flatnonzero(missing), repeated, guessed)


def _second_pass(local_T: Ints, inside: Ints) -> tuple[Ints, int]:
    """The bars of a repeated hour that belong to its second pass, and the number of bars whose pass is a guess.

    `inside` are the bars of the hour, in order.
    """
    back = np.flatnonzero(np.diff(local_T[inside]) <= 0)
    if len(back):
        return inside[back[0] + 1 :], 0
    first, last = inside[0], inside[-1]
    if not first or last + 1 == len(local_T):
        return inside[:0], len(inside)
    before, after = local_T[first] - local_T[first - 1], local_T[last + 1] - local_T[last]
    # Clocks before the hour continue into its first pass, clocks after it continue its second.
    return (inside if after < before else inside[:0]), len(inside) if before == after else 0


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
