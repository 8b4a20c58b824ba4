"""95 % intervals for every score and for differences of scores, by a block bootstrap in one pass of matrix products.

Comes in: a `Judged` (labels, probabilities and called classes of a model on labelled rows) and `block_N`. Goes out:
an interval for each of `METRICS` and each score of a class. A replicate weighs every block by a draw of Exp(1), the
Bayesian bootstrap (Rubin 1981), and sums the blocks' confusion matrices and losses under these weights; a plain draw
of blocks would lose a rare class in many replicates. Four corrections make the intervals cover the truth as often as
they say (benchmarks/bench_coverage.py):

- shares (accuracy, precision, recall, F1 of a class): Jeffreys' pseudo-counts, Gamma(½) right and Gamma(½) wrong
  (Brown, Cai, DasGupta 2001, section 4), times the design effect of the blocks (Kish 1965, section 8.2);
- other functions of the confusion matrix, as macro-F1: bias-corrected quantiles (Efron 1981), since a mean of F1 is
  concave and its replicates lie too low;
- all: stretched about the median from normal to Student quantiles with the effective number of blocks less one
  degrees of freedom (as Korn and Graubard 1998 do); those two kinds on the logit scale of their range;
- ECE: reflected (the basic interval of Davison and Hinkley 1997, section 5.2), since chance alone raises it.

No interval leaves the range of its metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit, ndtr, ndtri, stdtrit

from ctxtrain.evaluation.metrics import CHIEF, METRICS, MeanOfRows, Metric, OfConfusion, OwnSums, shown
from ctxtrain.evaluation.scores import Judged
from ctxtrain.labels import LABELS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Interval = list[float]  # low and high end

LEVEL = 0.95
REPLICATES = 2_000
_TAILS = ((1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2)
_Z = float(ndtri(_TAILS[2]))
_CHUNK = 4_096  # blocks weighted at a time: 2,000 × 4,096 float32 are 33 MB
_C = len(LABELS)
_ROWS = _C * _C  # the column with the number of rows
_TINY = 1e-12


def block_sums(judged: Judged, block_N: Ints) -> Floats:
    """Per block: 9 confusion cells, rows, then the columns of the metrics that have some, as `_columns` places them."""
    confusion_NK = (np.eye(_C)[judged.labels_N][:, :, None] * judged.called_NC[:, None, :]).reshape(-1, _C * _C)
    means = [metric.measure.rows(judged) for metric in METRICS if isinstance(metric.measure, MeanOfRows)]
    means_NK = np.stack([np.ones(len(block_N)), *means], axis=1)
    own = [metric.measure.columns(judged) for metric in METRICS if isinstance(metric.measure, OwnSums)]
    table_NK = np.concatenate([confusion_NK, means_NK, *own], axis=1)
    sums_GK = np.zeros((int(block_N.max()) + 1, table_NK.shape[1]))
    np.add.at(sums_GK, block_N, table_NK)
    return sums_GK


def _columns() -> dict[str, slice]:
    """Where the sums of a metric stand: first those with a number a row, then those with sums of their own."""
    widths = {metric.name: 1 for metric in METRICS if isinstance(metric.measure, MeanOfRows)}
    widths |= {metric.name: metric.measure.width for metric in METRICS if isinstance(metric.measure, OwnSums)}
    ends = dict(zip(widths, np.cumsum([*widths.values()]).tolist(), strict=True))
    return {name: slice(_ROWS + 1 + end - widths[name], _ROWS + 1 + end) for name, end in ends.items()}


def weighted_sums(sums_GK: Floats, seed: int, replicates: int = REPLICATES) -> Floats:
    """Σ_blocks weight · sum, of shape (replicates, K), with weights from Exp(1); the same draws for the same seed."""
    rng = np.random.default_rng(seed)
    totals_RK = np.zeros((replicates, sums_GK.shape[1]))
    for start in range(0, len(sums_GK), _CHUNK):
        part_GK = sums_GK[start : start + _CHUNK].astype(np.float32)
        totals_RK += rng.standard_exponential((replicates, len(part_GK)), dtype=np.float32) @ part_GK
    return totals_RK


def score_intervals(judged: Judged, block_N: Ints, seed: int = 0) -> dict[str, Any]:
    """An interval for each of `METRICS` by its name, and `per_class`, where an interval may be None.

    None stands where nothing is known: the recall of a class without rows, the precision of a class never called.
    """
    sums_GK = block_sums(judged, block_N)
    totals_RK = weighted_sums(sums_GK, seed)
    shares = _share_intervals(sums_GK, totals_RK, seed)
    return {
        **{metric.name: _score_interval(metric, sums_GK, totals_RK, shares, seed) for metric in METRICS},
        "per_class": {
            label: dict(zip(("precision", "recall", "f1"), shares[1 + c :: _C], strict=True))
            for c, label in enumerate(LABELS)
        },
    }


def difference_intervals(
    model: Judged, other: Judged, block_N: Ints, seed: int = 0, exact: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Model less other in the metrics beside the baselines, on the same rows under the same weights: {name: {value,
    interval}}.

    `exact` has values that are known better than from the rows, as those of random calls; the intervals move to them.
    """
    halves_GK = [block_sums(model, block_N), block_sums(other, block_N)]
    sums_GK = np.concatenate(halves_GK, axis=1)
    totals_RK = weighted_sums(sums_GK, seed)
    by_class = max(float(_stretch(_class_mass(half_GK)).mean()) for half_GK in halves_GK)
    overall = float(_stretch(sums_GK[:, _ROWS : _ROWS + 1])[0])
    result = {}
    for metric in shown("baselines"):
        found_R, found = _compared(metric, totals_RK), _compared(metric, _all(sums_GK)[None])
        of_classes = isinstance(metric.measure, OfConfusion) and not metric.measure.share_of_rows
        value, half = float(found[0]), _Z * (by_class if of_classes else overall) * float(found_R.std())
        ends = [value - half, value + half]
        if exact is not None:
            ends = [end + (exact[metric.name] - value) for end in ends]
            value = exact[metric.name]
        result[metric.name] = {"value": value, "interval": difference_within(metric, ends)}
    return result


def difference_within(metric: Metric, ends: Interval) -> Interval:
    """The part of an interval that a difference of two values of the metric can lie in."""
    widest = metric.highest - metric.lowest
    return _within(ends, -widest, widest)


def _within(ends: Interval, lowest: float, highest: float) -> Interval:
    return [float(min(max(lowest, end), highest)) for end in ends]


def _score(metric: Metric, sums_RK: Floats) -> Floats:
    """Its value for each row of sums, of shape (…, K) → (…,)."""
    if isinstance(metric.measure, OfConfusion):
        return metric.measure.scores(_cells(sums_RK))
    own_RK, rows_R = sums_RK[..., _columns()[metric.name]], sums_RK[..., _ROWS]
    if isinstance(metric.measure, OwnSums):
        return metric.measure.scores(own_RK, rows_R)
    mean_R: Floats = own_RK[..., 0] / rows_R
    return mean_R


def _compared(metric: Metric, totals_RK: Floats) -> Floats:
    first_R, second_R = (_score(metric, half_RK) for half_RK in np.split(totals_RK, 2, axis=1))
    return first_R - second_R


def _score_interval(
    metric: Metric, sums_GK: Floats, totals_RK: Floats, shares: Sequence[Interval | None], seed: int
) -> Interval | None:
    """By how the metric is computed; `shares` are those of `_share_intervals`."""
    if isinstance(metric.measure, OfConfusion) and metric.measure.share_of_rows:
        return shares[0]
    value, found_R = float(_score(metric, _all(sums_GK))), _score(metric, totals_RK)
    if isinstance(metric.measure, OfConfusion):
        if np.ptp(found_R) >= _TINY:
            bias = ndtri(np.clip((found_R < value).mean() + (found_R == value).mean() / 2, 0.001, 0.999))
            ends = _function_interval(metric, sums_GK, found_R, value, bias)
        elif metric.name == CHIEF:
            ends = _hull([share for share in shares[-_C:] if share])
        else:  # all right, or nothing: Jeffreys' pseudo-counts show what a few more rows could do
            more_RK = np.random.default_rng([seed, 2]).standard_gamma(0.5, (len(totals_RK), _C * _C))
            padded_RK = np.concatenate([totals_RK[:, : _C * _C] + more_RK, totals_RK[:, _C * _C :]], axis=1)
            ends = _function_interval(metric, sums_GK, _score(metric, padded_RK), value, 0.0)
    elif isinstance(metric.measure, MeanOfRows):
        ends = _mean_interval(found_R, float(_stretch(sums_GK[:, _ROWS : _ROWS + 1])[0]))
    else:
        low, _, high = np.quantile(found_R, _TAILS)
        ends = [2 * value - float(high), 2 * value - float(low)]
    return _within(ends, metric.lowest, metric.highest)


def _share_intervals(sums_GK: Floats, totals_RK: Floats, seed: int) -> list[Interval | None]:
    """Accuracy, then precision, recall and F1 of each class, each a right share of a whole."""
    right_GS, whole_GS = _shares(sums_GK)
    right_S, whole_S = _all(right_GS), _all(whole_GS)
    mass_S = _rows_a_block(whole_GS)
    # The design effect of accuracy, at most each share's own rows a block: that of a rare class is too noisy.
    pseudo_S = np.minimum(_design_effect(right_GS[:, 0], whole_GS[:, 0]), np.maximum(mass_S, 1))
    right_RS, whole_RS = _shares(totals_RK)
    rng = np.random.default_rng([seed, 1])
    more_right_RS, more_wrong_RS = (rng.standard_gamma(0.5, right_RS.shape) * pseudo_S for _ in range(2))
    share_RS = (right_RS + more_right_RS) / (whole_RS + more_right_RS + more_wrong_RS)
    quantiles = logit(np.clip(np.quantile(share_RS, _TAILS, axis=0), _TINY, 1 - _TINY))
    # A row alone is right or wrong, with a variance that its share fixes: only rows that share a block need Student.
    known_S = 1 / np.maximum(mass_S, 1)
    stretch_S = known_S + (1 - known_S) * _stretch(whole_GS)
    low_S, high_S = (expit(quantiles[1] + stretch_S * (quantiles[i] - quantiles[1])) for i in (0, 2))
    found: list[Interval | None] = []
    for right, whole, low, high in zip(right_S, whole_S, low_S, high_S, strict=True):
        value = right / whole if whole else 0.0
        low_end = 0.0 if right <= _TINY else min(low, value)
        high_end = 1.0 if right >= whole - _TINY else max(high, value)
        found.append([float(low_end), float(high_end)] if whole else None)
    rows_C = _all(whole_GS)[1 + _C : 1 + 2 * _C]
    for c in np.flatnonzero(rows_C == 0):
        found[1 + 2 * _C + c] = None  # an F1 of 0 by rule, not by chance
    return found


def _shares(sums: Floats) -> tuple[Floats, Floats]:
    """Right and whole of accuracy, precisions, recalls and F1s, of shape (…, 10): F1 = right / mean(calls, rows)."""
    cells = _cells(sums)
    right, rows, calls = np.diagonal(cells, axis1=-2, axis2=-1), cells.sum(axis=-1), cells.sum(axis=-2)
    return (
        np.concatenate([right.sum(axis=-1, keepdims=True), right, right, right], axis=-1),
        np.concatenate([rows.sum(axis=-1, keepdims=True), calls, rows, (calls + rows) / 2], axis=-1),
    )


def _hull(intervals: Sequence[Interval]) -> Interval:
    """The least and the most of them; for macro-F1 where no replicate differs (all right, or nothing)."""
    return [min((low for low, _ in intervals), default=0.0), max((high for _, high in intervals), default=1.0)]


def _function_interval(metric: Metric, sums_GK: Floats, found_R: Floats, value: float, bias: float) -> Interval:
    """Bias-corrected and stretched on the logit scale of the metric's range."""
    quantiles = np.quantile(found_R, ndtr(2 * bias + ndtri(_TAILS)))
    width = metric.highest - metric.lowest
    low, middle, high = logit(np.clip((quantiles - metric.lowest) / width, _TINY, 1 - _TINY))
    mass_GC = _class_mass(sums_GK)
    known_C = 1 / np.maximum(_rows_a_block(mass_GC), 1)
    stretch = float((known_C + (1 - known_C) * _stretch(mass_GC)).mean())
    low, high = (metric.lowest + width * expit(middle + stretch * (end - middle)) for end in (low, high))
    return [float(min(low, value)), float(max(high, value))]


def _mean_interval(mean_R: Floats, stretch: float) -> Interval:
    low, middle, high = np.quantile(mean_R, _TAILS)
    return [float(middle + stretch * (low - middle)), float(middle + stretch * (high - middle))]


def _class_mass(sums_GK: Floats) -> Floats:
    """Mean of rows and calls of each class in each block, the denominators of F1."""
    return _shares(sums_GK)[1][:, 1 + 2 * _C :]


def _cells(sums_GK: Floats) -> Floats:
    cells_GCC: Floats = sums_GK[..., : _C * _C].reshape(*sums_GK.shape[:-1], _C, _C)
    return cells_GCC


def _all(sums_GK: Floats) -> Floats:
    total: Floats = sums_GK.sum(axis=0)
    return total


def _rows_a_block(mass_GS: Floats) -> Floats:
    """Size of the block in which a row finds itself, on average: Σ n² / Σ n."""
    size: Floats = (mass_GS**2).sum(axis=0) / np.maximum(_all(mass_GS), _TINY)
    return size


def _stretch(mass_GS: Floats) -> Floats:
    """Student's quantile over the normal one, for (Σ n)² / Σ n² effective blocks; of shape (shares,).

    The root corrects what the weights lose: the variance of n draws of Exp(1), over their sum, is that of n + 1 blocks.
    """
    squares = np.maximum((mass_GS**2).sum(axis=0), _TINY)
    blocks_S = np.maximum(_all(mass_GS) ** 2 / squares, 2.0)
    stretch: Floats = stdtrit(blocks_S - 1, _TAILS[2]) / _Z * np.sqrt((blocks_S + 1) / (blocks_S - 1))
    return stretch


def _design_effect(right_G: Floats, whole_G: Floats) -> float:
    """Variance of a share by blocks over its variance by independent rows, at least 1 (Kish 1965, section 8.2)."""
    share = float(right_G.sum() / whole_G.sum())
    by_rows = whole_G.sum() * share * (1 - share)
    if len(right_G) < 2 or by_rows <= _TINY:
        return 1.0
    by_blocks = ((right_G - share * whole_G) ** 2).sum() * len(right_G) / (len(right_G) - 1)
    return float(max(1.0, by_blocks / by_rows))
