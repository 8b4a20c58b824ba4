"""Outliers of a window: a price hundreds of bar ranges away, a volume or delta far beyond all others.

Input: numbers of windows. Output: the same numbers with outliers moved closer, and the bars that contain one. A window
without outliers is returned bit for bit unchanged.

Prices: the sorted price levels of a window have gaps. If the whole range exceeds `WIDE` typical bar ranges, each gap of
more than `GAP` typical ranges is compressed. The order of the levels stays, and the levels with most closes keep at
least two fifths of the scale. The typical range is the median of the bars that move.

If many bars contain an outlier, such as bars without trades written as zeros, the median range would be the distance to
these outliers. In this case the ranges are computed within clusters of prices that are separated by wide gaps.

Legend: ... is empty for one window and W for W windows; L bars of a window.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

REL_TOL = 1e-9  # relative; smaller differences are rounding errors
# In typical true ranges. In 2,000 simulated and 1,000 real windows, the largest range is 34 and the largest gap 14.
WIDE, GAP = 100.0, 50.0
# Clusters are searched if a gap is at least this share of the window range, or the range this share of the price.
GAP_SHARE, PRICE_SHARE = 0.2, 0.5
CLUSTER_SHARE = 0.1  # of all prices, for a large cluster; large clusters must hold half of all prices
MOVING_SHARE = 0.25  # of bars that must move within clusters, unless every gap exceeds `PRICE_SHARE`
OCTAVES = 40.0  # of gap size, over which the compressed length of a gap still grows
MIN_DISTANCE = 5.0  # in typical deviations; a volume or delta outlier is moved here, or beyond all other values


def lower_median(values: Floats) -> Floats:
    """The lower median over the last dimension, of shape (...)."""
    middle = (values.shape[-1] - 1) // 2
    median: Floats = np.partition(values, middle, axis=-1)[..., middle]
    return median


def typical_size(sizes: Floats, least: Floats) -> Floats:
    """The lower median of the sizes above `least`, or 0 if there are none; over the last dimension, of shape (...)."""
    relevant = np.where(sizes > least[..., None], sizes, 0.0)
    below = np.count_nonzero(relevant == 0, axis=-1)
    count = sizes.shape[-1]
    middle = np.minimum(below + np.maximum(count - below - 1, 0) // 2, count - 1)
    median: Floats = np.take_along_axis(np.sort(relevant, axis=-1), middle[..., None], axis=-1)[..., 0]
    return median


def compress_price_outliers(prices: Floats, ranges: Floats) -> Bools:
    """Move price outliers closer, in place; return the bars that contain one.

    `prices` are open, high, low and close, of shape (4, ..., L); `ranges` the true ranges, of shape (..., L).
    """
    height = np.ravel(prices[1].max(axis=-1) - prices[2].min(axis=-1))
    unit = np.ravel(typical_size(ranges, REL_TOL * lower_median(np.abs(prices[3]))))
    is_outlier = np.zeros(ranges.shape, dtype=np.bool_)
    prices_W, outlier_W = prices.reshape(4, -1, ranges.shape[-1]), is_outlier.reshape(-1, ranges.shape[-1])
    is_wide = (unit > 0) & (height > WIDE * unit)
    levels = np.sort(prices_W.transpose(1, 0, 2).reshape(len(unit), -1), axis=-1)
    has_wide_gap = np.diff(levels, axis=-1).max(axis=-1) > GAP_SHARE * height
    is_large_share = height > PRICE_SHARE * np.abs(levels[:, [0, -1]]).max(axis=-1)
    for row in np.flatnonzero(is_wide | has_wide_gap | is_large_share).tolist():
        range_unit = _clustered_unit(prices_W[:, row], float(unit[row])) or (float(unit[row]) if is_wide[row] else 0.0)
        if range_unit:
            prices_W[:, row], outlier_W[row] = _compress_gaps(prices_W[:, row], range_unit)
    return is_outlier


def _clustered_unit(prices: Floats, plain_unit: float) -> float:
    """The typical range within clusters if it separates more clusters than `plain_unit` does, else 0.

    Searches the smallest gap size between clusters that exceeds `GAP` of these ranges.
    """
    levels, level = np.unique(prices, return_inverse=True)
    level, gaps = level.reshape(prices.shape), np.diff(levels)
    sizes = np.unique(gaps[gaps > REL_TOL * np.abs(levels[1:])])
    sizes = sizes[sizes > GAP * sizes[:1]]
    sizes = sizes[bisect_left(sizes, x=True, key=lambda size: _is_clustered(_clusters(gaps, size)[level])) :]
    while len(sizes):
        ranges = _ranges_within(prices, _clusters(gaps, sizes[0])[level])
        moves = ranges > REL_TOL * np.abs(prices[3])
        unit = float(typical_size(ranges * moves, np.zeros(())))
        if unit and sizes[0] > GAP * unit:
            is_separator = gaps >= sizes[0]
            nearby_price = np.maximum(np.abs(levels[1:]), np.abs(levels[:-1]))
            is_wide_for_price = (gaps > PRICE_SHARE * nearby_price)[is_separator].all()
            is_reliable = moves.mean() >= MOVING_SHARE or is_wide_for_price
            separates_more = not plain_unit or is_separator.sum() > (gaps > GAP * plain_unit).sum()
            return unit if is_reliable and separates_more and levels[-1] - levels[0] > WIDE * unit else 0.0
        sizes = sizes[max(1, int(np.searchsorted(sizes, GAP * unit, side="right"))) :]
    return 0.0


def _clusters(gaps: Floats, size: float) -> Ints:
    """The cluster index of each level: a gap of at least `size` starts a new cluster."""
    return np.concatenate([[0], np.cumsum(gaps >= size)])


def _is_clustered(cluster: Ints) -> bool:
    """Whether large clusters hold half of the prices."""
    counts = np.bincount(cluster.ravel())
    return bool(counts[counts >= CLUSTER_SHARE * cluster.size].sum() * 2 >= cluster.size)


def _ranges_within(prices: Floats, cluster: Ints) -> Floats:
    """True range of each bar from only those of its prices, and the last close, that are in the cluster of its close.

    `prices` and `cluster` have shape (4, L); the result has shape (L,).
    """
    close_cluster, close = cluster[3], prices[3]
    order = np.argsort(close_cluster, kind="stable")
    follows = np.concatenate([[False], close_cluster[order][1:] == close_cluster[order][:-1]])
    before = close.copy()
    before[order[follows]] = close[order[np.flatnonzero(follows) - 1]]
    inside = np.where(cluster == close_cluster, prices, close)
    ranges: Floats = np.maximum(inside.max(axis=0), before) - np.minimum(inside.min(axis=0), before)
    return ranges


def _compress_gaps(prices: Floats, unit: float) -> tuple[Floats, Bools]:
    """The compressed prices of one window, of shape (4, L), and its bars with outliers, of shape (L,)."""
    levels, level = np.unique(prices, return_inverse=True)
    level = level.reshape(prices.shape)
    gaps = np.diff(levels)
    is_far = gaps > GAP * unit
    if not is_far.any():
        return prices, np.zeros(prices.shape[1], dtype=np.bool_)
    cluster = np.concatenate([[0], np.cumsum(is_far)])
    core = _core(cluster[level[3]], levels[level[3]])
    is_core = ~is_far & (cluster[1:] == core)
    is_other = ~is_far & ~is_core
    span = max(float(gaps[is_core].sum()), unit)
    with np.errstate(over="ignore"):
        octaves = np.log2(gaps[is_far] / unit / GAP)
    gaps[is_far] = span / is_far.sum() * (0.5 + 0.5 * np.minimum(octaves / OCTAVES, 1.0))
    if (others := float(gaps[is_other].sum())) > span / 2:
        gaps[is_other] *= span / 2 / others
    new_levels = np.concatenate([[0.0], np.cumsum(gaps)])
    first = int(np.argmax(cluster == core))
    new_levels += levels[first] - new_levels[first]
    return new_levels[level], (cluster[level] != core).any(axis=0)


def _core(cluster: Ints, close: Floats) -> int:
    """The cluster with most closes. If all of these are equal, the one with most closes among those that vary."""
    counts = np.bincount(cluster)
    most = int(counts.argmax())
    moving = [n for n in np.flatnonzero(counts).tolist() if np.ptp(close[cluster == n]) > 0]
    return most if most in moving or not moving else max(moving, key=lambda n: counts[n])


def _outlier_rank(sizes: Floats, is_outlier: Bools) -> Floats:
    """Rank of each outlier among those of its window, from 0 for the smallest to below 1; same shape as `sizes`.

    So several outliers keep their order, and windows with the same outliers in a different order have different texts.
    """
    ranks = np.zeros(sizes.shape)
    for window in zip(*np.nonzero(is_outlier.sum(axis=-1) > 1), strict=True):
        outliers = is_outlier[window]
        distinct, rank = np.unique(sizes[window][outliers], return_inverse=True)
        ranks[window][outliers] = rank / len(distinct)
    return ranks


def compress_outliers(values: Floats, limits: Sequence[float]) -> tuple[Floats, Bools]:
    """Move values that are too many typical deviations from the median closer; return the values and which were moved.

    `values` has shape (K, ..., L); `limits` holds the allowed number of deviations for each of the K kinds.
    """
    allowed = np.reshape(limits, (-1, *[1] * (values.ndim - 2)))
    middle = lower_median(values)
    deviation = np.abs(values - middle[..., None])
    unit = typical_size(deviation, REL_TOL * np.abs(middle))
    is_outlier = (deviation > (allowed * unit)[..., None]) & (unit[..., None] > 0)
    if not is_outlier.any():
        return values, is_outlier
    furthest = np.where(is_outlier, 0.0, deviation).max(axis=-1)
    limit = np.maximum(MIN_DISTANCE * unit, furthest)[..., None]
    offset = np.sign(values - middle[..., None]) * limit * (1 + _outlier_rank(deviation, is_outlier))
    return np.where(is_outlier, middle[..., None] + offset, values), is_outlier
