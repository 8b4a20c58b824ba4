"""95 % confidence intervals for scores and for differences of scores: a block bootstrap by matrix products.

Input: `ScoredRows` of a model and `block_N`. Output: an interval for each of `METRICS` and each score of a class.

Each replicate weights every block by a draw from Exp(1) (the Bayesian bootstrap, Rubin 1981) and sums the confusion
matrices and losses of the blocks under these weights. Drawing blocks with replacement would lose a rare class in many
replicates. Four corrections bring the coverage close to 95 % (benchmarks/bench_coverage.py):

- proportions (accuracy, precision, recall, F1 of a class): Jeffreys' pseudo-counts, Gamma(½) correct and Gamma(½) wrong
  (Brown, Cai, DasGupta 2001, section 4), times the design effect of the blocks (Kish 1965, section 8.2);
- other functions of the confusion matrix, such as macro-F1: bias-corrected quantiles (Efron 1981), because a mean of F1
  is concave and its replicates lie too low;
- all except ECE: stretched about the median from normal to Student quantiles. The degrees of freedom are the effective
  number of blocks minus one (as in Korn and Graubard 1998). The first two kinds are stretched on the logit scale;
- ECE: reflected (the basic interval of Davison and Hinkley 1997, section 5.2), because noise alone raises it.

Intervals are clipped to the range of the metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit, ndtr, ndtri, stdtrit

from ctxtrain.evaluation.metric_formulas import ScoredRows
from ctxtrain.evaluation.metrics import (
    METRICS,
    PRIMARY_METRIC,
    FromColumnSums,
    FromConfusion,
    MeanOverRows,
    Metric,
    metrics_for,
)
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
_ROWS = _C * _C  # column of `block_sums` with the number of rows
_TINY = 1e-12


def block_sums(scored: ScoredRows, block_N: Ints) -> Floats:
    """Sums per block, of shape (blocks, K): 9 confusion cells, rows, then the columns that `_columns` lists."""
    confusion_NK = (np.eye(_C)[scored.labels_N][:, :, None] * scored.predicted_NC[:, None, :]).reshape(-1, _C * _C)
    means = [metric.measure.per_row(scored) for metric in METRICS if isinstance(metric.measure, MeanOverRows)]
    means_NK = np.stack([np.ones(len(block_N)), *means], axis=1)
    extra = [metric.measure.columns(scored) for metric in METRICS if isinstance(metric.measure, FromColumnSums)]
    table_NK = np.concatenate([confusion_NK, means_NK, *extra], axis=1)
    sums_GK = np.zeros((int(block_N.max()) + 1, table_NK.shape[1]))
    np.add.at(sums_GK, block_N, table_NK)
    return sums_GK


def _columns() -> dict[str, slice]:
    """Columns of `block_sums` by metric name: first the `MeanOverRows` metrics, then the `FromColumnSums` ones."""
    widths = {metric.name: 1 for metric in METRICS if isinstance(metric.measure, MeanOverRows)}
    widths |= {metric.name: metric.measure.width for metric in METRICS if isinstance(metric.measure, FromColumnSums)}
    ends = dict(zip(widths, np.cumsum([*widths.values()]).tolist(), strict=True))
    return {name: slice(_ROWS + 1 + end - widths[name], _ROWS + 1 + end) for name, end in ends.items()}


def weighted_sums(sums_GK: Floats, seed: int, replicates: int = REPLICATES) -> Floats:
    """Σ_blocks weight · sum, of shape (replicates, K), with weights from Exp(1) that depend on the seed alone."""
    rng = np.random.default_rng(seed)
    totals_RK = np.zeros((replicates, sums_GK.shape[1]))
    for start in range(0, len(sums_GK), _CHUNK):
        part_GK = sums_GK[start : start + _CHUNK].astype(np.float32)
        totals_RK += rng.standard_exponential((replicates, len(part_GK)), dtype=np.float32) @ part_GK
    return totals_RK


def score_intervals(scored: ScoredRows, block_N: Ints, seed: int = 0) -> dict[str, Any]:
    """An interval for each of `METRICS` by name, and for the scores of each class under `per_class`.

    An undefined score of a class gets None: the recall of a class without rows, the precision of a class that is never
    predicted.
    """
    sums_GK = block_sums(scored, block_N)
    totals_RK = weighted_sums(sums_GK, seed)
    proportions = _proportion_intervals(sums_GK, totals_RK, seed)
    return {
        **{metric.name: _score_interval(metric, sums_GK, totals_RK, proportions, seed) for metric in METRICS},
        "per_class": {
            label: dict(zip(("precision", "recall", "f1"), proportions[1 + c :: _C], strict=True))
            for c, label in enumerate(LABELS)
        },
    }


NO_INTERVALS: dict[str, Any] = {
    **dict.fromkeys(metric.name for metric in METRICS),
    "per_class": {label: dict.fromkeys(("precision", "recall", "f1")) for label in LABELS},
}


def difference_intervals(
    model: ScoredRows, other: ScoredRows, block_N: Ints, seed: int = 0, exact: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Model minus other in each metric of the "baselines" view, as {name: {value, interval}}.

    Both are resampled with the same weights on the same rows, so the differences are paired. `exact` holds differences
    that are known more exactly than from the rows, such as those of random predictions; the intervals are shifted to
    them.
    """
    halves_GK = [block_sums(model, block_N), block_sums(other, block_N)]
    sums_GK = np.concatenate(halves_GK, axis=1)
    totals_RK = weighted_sums(sums_GK, seed)
    class_stretch = max(float(_student_stretch(_f1_denominators(half_GK)).mean()) for half_GK in halves_GK)
    row_stretch = float(_student_stretch(sums_GK[:, _ROWS : _ROWS + 1])[0])
    result = {}
    for metric in metrics_for("baselines"):
        value = float(_differences(metric, _total(sums_GK)[None])[0])
        is_per_class = isinstance(metric.measure, FromConfusion) and not metric.measure.is_proportion
        deviation = float(_differences(metric, totals_RK).std())
        half = _Z * (class_stretch if is_per_class else row_stretch) * deviation
        ends = [value - half, value + half]
        if exact is not None:
            ends = [end + (exact[metric.name] - value) for end in ends]
            value = exact[metric.name]
        result[metric.name] = {"value": value, "interval": clip_difference(metric, ends)}
    return result


def clip_difference(metric: Metric, ends: Interval) -> Interval:
    """Clip an interval to the possible differences of two values of the metric."""
    largest = metric.highest - metric.lowest
    return _clip(ends, -largest, largest)


def _clip(ends: Interval, lowest: float, highest: float) -> Interval:
    return [float(min(max(lowest, end), highest)) for end in ends]


def _score(metric: Metric, sums_RK: Floats) -> Floats:
    """The metric's value for each row of sums, of shape (…, K) → (…,)."""
    if isinstance(metric.measure, FromConfusion):
        return metric.measure.compute(_cells(sums_RK))
    columns_RK, rows_R = sums_RK[..., _columns()[metric.name]], sums_RK[..., _ROWS]
    if isinstance(metric.measure, FromColumnSums):
        return metric.measure.compute(columns_RK, rows_R)
    mean_R: Floats = columns_RK[..., 0] / rows_R
    return mean_R


def _differences(metric: Metric, totals_RK: Floats) -> Floats:
    first_R, second_R = (_score(metric, half_RK) for half_RK in np.split(totals_RK, 2, axis=1))
    return first_R - second_R


def _score_interval(
    metric: Metric, sums_GK: Floats, totals_RK: Floats, proportions: Sequence[Interval | None], seed: int
) -> Interval | None:
    """The interval of one metric; `proportions` is the result of `_proportion_intervals`."""
    if isinstance(metric.measure, FromConfusion) and metric.measure.is_proportion:
        return proportions[0]
    value, values_R = float(_score(metric, _total(sums_GK))), _score(metric, totals_RK)
    if isinstance(metric.measure, FromConfusion):
        if np.ptp(values_R) >= _TINY:
            bias = ndtri(np.clip((values_R < value).mean() + (values_R == value).mean() / 2, 0.001, 0.999))
            ends = _function_interval(metric, sums_GK, values_R, value, bias)
        elif metric.name == PRIMARY_METRIC:
            ends = _hull([interval for interval in proportions[-_C:] if interval])
        else:  # all replicates agree (all correct or none): only Jeffreys' pseudo-counts give the interval a width
            pseudo_RK = np.random.default_rng([seed, 2]).standard_gamma(0.5, (len(totals_RK), _C * _C))
            padded_RK = np.concatenate([totals_RK[:, : _C * _C] + pseudo_RK, totals_RK[:, _C * _C :]], axis=1)
            ends = _function_interval(metric, sums_GK, _score(metric, padded_RK), value, 0.0)
    elif isinstance(metric.measure, MeanOverRows):
        ends = _mean_interval(values_R, float(_student_stretch(sums_GK[:, _ROWS : _ROWS + 1])[0]))
    else:
        low, _, high = np.quantile(values_R, _TAILS)
        ends = [2 * value - float(high), 2 * value - float(low)]
    return _clip(ends, metric.lowest, metric.highest)


def _proportion_intervals(sums_GK: Floats, totals_RK: Floats, seed: int) -> list[Interval | None]:
    """Intervals of accuracy, then precision, recall and F1 of each class, each a proportion correct / total."""
    correct_GS, total_GS = _proportions(sums_GK)
    correct_S, total_S = _total(correct_GS), _total(total_GS)
    size_S = _mean_block_size(total_GS)
    # The design effect of accuracy, capped at the proportion's block size: that of a rare class is too noisy.
    design_S = np.minimum(_design_effect(correct_GS[:, 0], total_GS[:, 0]), np.maximum(size_S, 1))
    correct_RS, total_RS = _proportions(totals_RK)
    rng = np.random.default_rng([seed, 1])
    pseudo_correct_RS, pseudo_wrong_RS = (rng.standard_gamma(0.5, correct_RS.shape) * design_S for _ in range(2))
    proportion_RS = (correct_RS + pseudo_correct_RS) / (total_RS + pseudo_correct_RS + pseudo_wrong_RS)
    quantiles = logit(np.clip(np.quantile(proportion_RS, _TAILS, axis=0), _TINY, 1 - _TINY))
    # The proportion itself fixes the variance of an independent row: only rows that share a block need Student.
    known_S = 1 / np.maximum(size_S, 1)
    stretch_S = known_S + (1 - known_S) * _student_stretch(total_GS)
    low_S, high_S = (expit(quantiles[1] + stretch_S * (quantiles[i] - quantiles[1])) for i in (0, 2))
    intervals: list[Interval | None] = []
    for correct, total, low, high in zip(correct_S, total_S, low_S, high_S, strict=True):
        value = correct / total if total else 0.0
        low_end = 0.0 if correct <= _TINY else min(low, value)
        high_end = 1.0 if correct >= total - _TINY else max(high, value)
        intervals.append([float(low_end), float(high_end)] if total else None)
    rows_C = _total(total_GS)[1 + _C : 1 + 2 * _C]
    for c in np.flatnonzero(rows_C == 0):
        intervals[1 + 2 * _C + c] = None  # the F1 of an absent class is 0 by definition, not by chance
    return intervals


def _proportions(sums: Floats) -> tuple[Floats, Floats]:
    """Numerators and denominators of accuracy, precisions, recalls and F1s, each of shape (…, 10).

    F1 = correct / mean(predictions, rows).
    """
    cells = _cells(sums)
    correct, rows, predictions = np.diagonal(cells, axis1=-2, axis2=-1), cells.sum(axis=-1), cells.sum(axis=-2)
    return (
        np.concatenate([correct.sum(axis=-1, keepdims=True), correct, correct, correct], axis=-1),
        np.concatenate([rows.sum(axis=-1, keepdims=True), predictions, rows, (predictions + rows) / 2], axis=-1),
    )


def _hull(intervals: Sequence[Interval]) -> Interval:
    """The smallest interval around all of them: macro-F1's where all replicates agree (all correct or none)."""
    return [min((low for low, _ in intervals), default=0.0), max((high for _, high in intervals), default=1.0)]


def _function_interval(metric: Metric, sums_GK: Floats, values_R: Floats, value: float, bias: float) -> Interval:
    """Bias-corrected quantiles, stretched on the logit scale of the metric's range."""
    quantiles = np.quantile(values_R, ndtr(2 * bias + ndtri(_TAILS)))
    width = metric.highest - metric.lowest
    low, middle, high = logit(np.clip((quantiles - metric.lowest) / width, _TINY, 1 - _TINY))
    mass_GC = _f1_denominators(sums_GK)
    known_C = 1 / np.maximum(_mean_block_size(mass_GC), 1)
    stretch = float((known_C + (1 - known_C) * _student_stretch(mass_GC)).mean())
    low, high = (metric.lowest + width * expit(middle + stretch * (end - middle)) for end in (low, high))
    return [float(min(low, value)), float(max(high, value))]


def _mean_interval(mean_R: Floats, stretch: float) -> Interval:
    low, middle, high = np.quantile(mean_R, _TAILS)
    return [float(middle + stretch * (low - middle)), float(middle + stretch * (high - middle))]


def _f1_denominators(sums_GK: Floats) -> Floats:
    """Mean of rows and predictions of each class in each block, of shape (blocks, 3)."""
    return _proportions(sums_GK)[1][:, 1 + 2 * _C :]


def _cells(sums_GK: Floats) -> Floats:
    """Confusion matrices of shape (…, 3, 3) from `block_sums` columns."""
    cells_GCC: Floats = sums_GK[..., : _C * _C].reshape(*sums_GK.shape[:-1], _C, _C)
    return cells_GCC


def _total(sums_GK: Floats) -> Floats:
    total: Floats = sums_GK.sum(axis=0)
    return total


def _mean_block_size(mass_GS: Floats) -> Floats:
    """Mean size of a row's block, over rows: Σ n² / Σ n."""
    size: Floats = (mass_GS**2).sum(axis=0) / np.maximum(_total(mass_GS), _TINY)
    return size


def _student_stretch(mass_GS: Floats) -> Floats:
    """Student quantile over normal quantile, for (Σ n)² / Σ n² effective blocks.

    The square root corrects a bias of the weights: n draws of Exp(1), divided by their sum, have the variance of n + 1
    blocks.
    """
    squares = np.maximum((mass_GS**2).sum(axis=0), _TINY)
    blocks_S = np.maximum(_total(mass_GS) ** 2 / squares, 2.0)
    stretch: Floats = stdtrit(blocks_S - 1, _TAILS[2]) / _Z * np.sqrt((blocks_S + 1) / (blocks_S - 1))
    return stretch


def _design_effect(correct_G: Floats, total_G: Floats) -> float:
    """Variance of a proportion by blocks over that by independent rows, at least 1 (Kish 1965, section 8.2)."""
    proportion = float(correct_G.sum() / total_G.sum())
    by_rows = total_G.sum() * proportion * (1 - proportion)
    if len(correct_G) < 2 or by_rows <= _TINY:
        return 1.0
    by_blocks = ((correct_G - proportion * total_G) ** 2).sum() * len(correct_G) / (len(correct_G) - 1)
    return float(max(1.0, by_blocks / by_rows))
