"""Prints that are far off: a price hundreds of bar ranges away, a volume or a delta beyond any other of its window.

Comes in: numbers of windows. Goes out: the same, with such prints drawn near, and the bars that hold one. A window
without one comes back as it was, to the bit.

Prices: sorted, the levels of a window leave gaps. Where the whole range exceeds `WIDE` typical bar ranges, a gap of
more than `GAP` of them is drawn together, the order of all levels kept, so that the levels where most closes lie take
at least two fifths of the scale. Typical is the median of the bars that move.

Where many bars hold such a print, as those without a trade that are written as zeros, the typical range would be the
way to the prints and back. There the ranges are taken within clusters: prices that no wide gap parts.

Legend: ... nothing for one window, and W for W windows; L bars of a window.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

SAME = 1e-9  # numbers that differ by less, as a share of their size, differ by rounding
# In typical true ranges. 2,000 simulated and 1,000 real windows reach a range of 34 and a gap of 14.
WIDE, GAP = 100.0, 50.0
# Clusters are looked for where a gap is such a share of the window's range, or the range is such a share of the price.
PARTED, OF_PRICE = 0.2, 0.5
BIG = 0.1  # share of the prices in a cluster; half of all prices lie in such clusters
MOVING = 0.25  # share of the bars that move within clusters; fewer tell a unit only where gaps are `OF_PRICE`
OCTAVES = 40.0  # of a gap's size, over which the length that is left of it still grows
NEAREST = 5.0  # typical deviations at which a wild volume or delta is put, or further where others lie further


def low_median(values: Floats) -> Floats:
    """The lower of the middle values, over the last dimension; of shape (...)."""
    middle = (values.shape[-1] - 1) // 2
    found: Floats = np.partition(values, middle, axis=-1)[..., middle]
    return found


def typical(sizes: Floats, least: Floats) -> Floats:
    """The lower median of the sizes above `least`, or 0 without any; over the last dimension, of shape (...)."""
    counted = np.where(sizes > least[..., None], sizes, 0.0)
    below = np.count_nonzero(counted == 0, axis=-1)
    count = sizes.shape[-1]
    middle = np.minimum(below + np.maximum(count - below - 1, 0) // 2, count - 1)
    found: Floats = np.take_along_axis(np.sort(counted, axis=-1), middle[..., None], axis=-1)[..., 0]
    return found


def near_prices(prices: Floats, ranges: Floats) -> Bools:
    """Draw far prices near, in place, in open, high, low and close of shape (4, ..., L); the bars that hold one.

    `ranges` are the true ranges, of shape (..., L).
    """
    height = np.ravel(prices[1].max(axis=-1) - prices[2].min(axis=-1))
    unit = np.ravel(typical(ranges, SAME * low_median(np.abs(prices[3]))))
    is_wild = np.zeros(ranges.shape, dtype=np.bool_)
    each, wild = prices.reshape(4, -1, ranges.shape[-1]), is_wild.reshape(-1, ranges.shape[-1])
    is_wide = (unit > 0) & (height > WIDE * unit)
    levels = np.sort(each.transpose(1, 0, 2).reshape(len(unit), -1), axis=-1)
    is_parted = np.diff(levels, axis=-1).max(axis=-1) > PARTED * height
    is_deep = height > OF_PRICE * np.abs(levels[:, [0, -1]]).max(axis=-1)
    for row in np.flatnonzero(is_wide | is_parted | is_deep).tolist():
        found = _clustered_unit(each[:, row], float(unit[row])) or (float(unit[row]) if is_wide[row] else 0.0)
        if found:
            each[:, row], wild[row] = _drawn(each[:, row], found)
    return is_wild


def _clustered_unit(prices: Floats, plain: float) -> float:
    """The typical range within clusters, where it parts more clusters than the plain one does; 0 where there are none.

    Sought is the smallest size of gaps between clusters that exceeds `GAP` such ranges.
    """
    levels, place = np.unique(prices, return_inverse=True)
    place, gaps = place.reshape(prices.shape), np.diff(levels)
    sizes = np.unique(gaps[gaps > SAME * np.abs(levels[1:])])
    sizes = sizes[sizes > GAP * sizes[:1]]
    sizes = sizes[bisect_left(sizes, x=True, key=lambda size: _is_clustered(_clusters(gaps, size)[place])) :]
    while len(sizes):
        ranges = _ranges_within(prices, _clusters(gaps, sizes[0])[place])
        moves = ranges > SAME * np.abs(prices[3])
        unit = float(typical(ranges * moves, np.zeros(())))
        if unit and sizes[0] > GAP * unit:
            is_cut = gaps >= sizes[0]
            is_of_price = (gaps > OF_PRICE * np.maximum(np.abs(levels[1:]), np.abs(levels[:-1])))[is_cut].all()
            is_known = moves.mean() >= MOVING or is_of_price
            is_more = not plain or is_cut.sum() > (gaps > GAP * plain).sum()
            return unit if is_known and is_more and levels[-1] - levels[0] > WIDE * unit else 0.0
        sizes = sizes[max(1, int(np.searchsorted(sizes, GAP * unit, side="right"))) :]
    return 0.0


def _clusters(gaps: Floats, size: float) -> Ints:
    """The cluster of each level: a gap of the size or more begins another."""
    return np.concatenate([[0], np.cumsum(gaps >= size)])


def _is_clustered(cluster: Ints) -> bool:
    """Whether half of the prices lie in big clusters."""
    counts = np.bincount(cluster.ravel())
    return bool(counts[counts >= BIG * cluster.size].sum() * 2 >= cluster.size)


def _ranges_within(prices: Floats, cluster: Ints) -> Floats:
    """The true range of each bar by those of its prices, and the last close, that lie in the cluster of its close.

    Comes in: prices and their clusters, of shape (4, L). Goes out: shape (L,).
    """
    own, close = cluster[3], prices[3]
    order = np.argsort(own, kind="stable")
    follows = np.concatenate([[False], own[order][1:] == own[order][:-1]])
    before = close.copy()
    before[order[follows]] = close[order[np.flatnonzero(follows) - 1]]
    inside = np.where(cluster == own, prices, close)
    ranges: Floats = np.maximum(inside.max(axis=0), before) - np.minimum(inside.min(axis=0), before)
    return ranges


def _drawn(prices: Floats, unit: float) -> tuple[Floats, Bools]:
    """The same of one window, of shape (4, L) and (L,)."""
    levels, place = np.unique(prices, return_inverse=True)
    place = place.reshape(prices.shape)
    gaps = np.diff(levels)
    is_far = gaps > GAP * unit
    if not is_far.any():
        return prices, np.zeros(prices.shape[1], dtype=np.bool_)
    cluster = np.concatenate([[0], np.cumsum(is_far)])
    core = _core(cluster[place[3]], levels[place[3]])
    is_core = ~is_far & (cluster[1:] == core)
    is_other = ~is_far & ~is_core
    span = max(float(gaps[is_core].sum()), unit)
    with np.errstate(over="ignore"):
        octaves = np.log2(gaps[is_far] / unit / GAP)
    gaps[is_far] = span / is_far.sum() * (0.5 + 0.5 * np.minimum(octaves / OCTAVES, 1.0))
    if (others := float(gaps[is_other].sum())) > span / 2:
        gaps[is_other] *= span / 2 / others
    drawn = np.concatenate([[0.0], np.cumsum(gaps)])
    first = int(np.argmax(cluster == core))
    drawn += levels[first] - drawn[first]
    return drawn[place], (cluster[place] != core).any(axis=0)


def _core(cluster: Ints, close: Floats) -> int:
    """The cluster of most closes; where these all are one price, that of most closes among those that move, if any."""
    counts = np.bincount(cluster)
    most = int(counts.argmax())
    moving = [n for n in np.flatnonzero(counts).tolist() if np.ptp(close[cluster == n]) > 0]
    return most if most in moving or not moving else max(moving, key=lambda n: counts[n])


def _order(sizes: Floats, is_wild: Bools) -> Floats:
    """Where each wild size stands among those of its window, from 0 for the smallest to below 1; of the same shape.

    So several wild values keep their order, and windows with the same ones in another order keep texts of their own.
    """
    order = np.zeros(sizes.shape)
    for window in zip(*np.nonzero(is_wild.sum(axis=-1) > 1), strict=True):
        wild = is_wild[window]
        found, rank = np.unique(sizes[window][wild], return_inverse=True)
        order[window][wild] = rank / len(found)
    return order


def near_values(values: Floats, most: Sequence[float]) -> tuple[Floats, Bools]:
    """Values of shape (K, ..., L), those nearer that lie too many typical deviations from the median; which do.

    `most` has how many are allowed for each of K kinds.
    """
    allowed = np.reshape(most, (-1, *[1] * (values.ndim - 2)))
    middle = low_median(values)
    deviation = np.abs(values - middle[..., None])
    unit = typical(deviation, SAME * np.abs(middle))
    is_wild = (deviation > (allowed * unit)[..., None]) & (unit[..., None] > 0)
    if not is_wild.any():
        return values, is_wild
    furthest = np.where(is_wild, 0.0, deviation).max(axis=-1)
    limit = np.maximum(NEAREST * unit, furthest)[..., None]
    away = np.sign(values - middle[..., None]) * limit * (1 + _order(deviation, is_wild))
    return np.where(is_wild, middle[..., None] + away, values), is_wild
