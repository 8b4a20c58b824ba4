"""95 % intervals for every score and for differences of scores, by a block bootstrap in one pass of matrix products.

Comes in: a `Judged` (labels, probabilities and called classes of a model on labelled rows) and `block_N`. Goes out:
intervals by score. A replicate weighs every block by a draw of Exp(1), the Bayesian bootstrap (Rubin 1981), and sums
the blocks' confusion matrices and losses under these weights; a plain draw of blocks would lose a rare class in many
replicates. Four corrections make the intervals cover the truth as often as they say (benchmarks/bench_coverage.py):

- shares (accuracy, precision, recall, F1 of a class): Jeffreys' pseudo-counts, Gamma(½) right and Gamma(½) wrong
  (Brown, Cai, DasGupta 2001, section 4), times the design effect of the blocks (Kish 1965, section 8.2);
- macro-F1: bias-corrected quantiles (Efron 1981), since a mean of F1 is concave and its replicates lie too low;
- all: stretched about the median from normal to Student quantiles with the effective number of blocks less one
  degrees of freedom (as Korn and Graubard 1998 do), for shares on the logit scale;
- ECE: reflected (the basic interval of Davison and Hinkley 1997, section 5.2), since chance alone raises it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import norm, t

from ctxtrain.evaluation.metrics import ECE_BINS, confusion_scores, equal_mass_bins, squared_errors
from ctxtrain.labels import LABELS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Interval = list[float]  # low and high end

LEVEL = 0.95
REPLICATES = 2_000
_TAILS = ((1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2)
_Z = float(norm.ppf(_TAILS[2]))
_CHUNK = 4_096  # blocks weighted at a time: 2,000 × 4,096 float32 are 33 MB
_C = len(LABELS)
_TINY = 1e-12


@dataclass(frozen=True)
class Judged:
    """Labelled rows and what a model says about them.

    `called_NC` holds the class that each row is called, as one-hot rows, or as chances where the calls are random.
    `losses_N` are −ln p(true class).
    """

    labels_N: Ints
    probabilities_NC: Floats
    called_NC: Floats
    losses_N: Floats

    def sums(self, block_N: Ints) -> Floats:
        """Per block: 9 confusion cells, rows, loss, squared error, and a signed calibration gap for each ECE bin."""
        confusion_NK = (np.eye(_C)[self.labels_N][:, :, None] * self.called_NC[:, None, :]).reshape(-1, _C * _C)
        confidence_N = self.probabilities_NC.max(axis=1)
        gap_N = (self.probabilities_NC.argmax(axis=1) == self.labels_N) - confidence_N
        gaps_NK = np.zeros((len(gap_N), ECE_BINS))
        for bin_number, rows in enumerate(equal_mass_bins(confidence_N)):
            gaps_NK[rows, bin_number] = gap_N[rows]
        errors_N = squared_errors(self.probabilities_NC, self.labels_N)
        means_NK = np.stack([np.ones_like(gap_N), self.losses_N, errors_N], axis=1)
        table_NK = np.concatenate([confusion_NK, means_NK, gaps_NK], axis=1)
        sums_GK = np.zeros((int(block_N.max()) + 1, table_NK.shape[1]))
        np.add.at(sums_GK, block_N, table_NK)
        return sums_GK


def weighted_sums(sums_GK: Floats, seed: int, replicates: int = REPLICATES) -> Floats:
    """Σ_blocks weight · sum, of shape (replicates, K), with weights from Exp(1); the same draws for the same seed."""
    rng = np.random.default_rng(seed)
    totals_RK = np.zeros((replicates, sums_GK.shape[1]))
    for start in range(0, len(sums_GK), _CHUNK):
        part_GK = sums_GK[start : start + _CHUNK].astype(np.float32)
        totals_RK += rng.standard_exponential((replicates, len(part_GK)), dtype=np.float32) @ part_GK
    return totals_RK


def score_intervals(judged: Judged, block_N: Ints, seed: int = 0) -> dict[str, Any]:
    """`accuracy`, `macro_f1`, `nll`, `brier`, `ece` and `per_class`, each as an interval or None.

    None stands where nothing is known: the recall of a class without rows, the precision of a class never called.
    """
    sums_GK = judged.sums(block_N)
    totals_RK = weighted_sums(sums_GK, seed)
    shares = _share_intervals(sums_GK, totals_RK, seed)
    cells_RCC = totals_RK[:, : _C * _C].reshape(-1, _C, _C)
    rows_R = totals_RK[:, 9]
    whole = _all(sums_GK)
    stretch = _stretch(sums_GK[:, 9:10])[0]
    ece_R = np.abs(totals_RK[:, 12:]).sum(axis=1) / rows_R
    low, _, high = np.quantile(ece_R, _TAILS)
    ece = float(np.abs(whole[12:]).sum() / whole[9])
    macro_f1 = float(confusion_scores(whole[:9].reshape(_C, _C))["macro_f1"])
    return {
        "accuracy": shares[0],
        "macro_f1": _macro_f1_interval(sums_GK, confusion_scores(cells_RCC)["macro_f1"], macro_f1, shares[-_C:]),
        "nll": _mean_interval(totals_RK[:, 10] / rows_R, stretch),
        "brier": _mean_interval(totals_RK[:, 11] / rows_R, stretch),
        "ece": [max(0.0, 2 * ece - float(high)), max(0.0, 2 * ece - float(low))],
        "per_class": {
            label: dict(zip(("precision", "recall", "f1"), shares[1 + c :: _C], strict=True))
            for c, label in enumerate(LABELS)
        },
    }


def difference_intervals(model: Judged, other: Judged, block_N: Ints, seed: int = 0) -> dict[str, Any]:
    """Model less other, on the same rows, under the same weights: {score: {value, interval}}."""
    sums_GK = np.concatenate([model.sums(block_N), other.sums(block_N)], axis=1)
    totals_RK = weighted_sums(sums_GK, seed)
    found_R, found = _compared(totals_RK), _compared(_all(sums_GK)[None])
    width = sums_GK.shape[1] // 2
    by_class = max(float(_stretch(_class_mass(half_GK)).mean()) for half_GK in (sums_GK[:, :width], sums_GK[:, width:]))
    overall = float(_stretch(sums_GK[:, 9:10])[0])
    result = {}
    for name, stretch in (("macro_f1", by_class), ("accuracy", overall), ("nll", overall)):
        value, half = float(found[name][0]), _Z * stretch * float(found_R[name].std())
        result[name] = {"value": value, "interval": [value - half, value + half]}
    return result


def _compared(totals_RK: Floats) -> Mapping[str, Floats]:
    halves = np.split(totals_RK, 2, axis=1)
    scores = [confusion_scores(half[:, :9].reshape(-1, _C, _C)) for half in halves]
    losses = [half[:, 10] / half[:, 9] for half in halves]
    return {
        "macro_f1": scores[0]["macro_f1"] - scores[1]["macro_f1"],
        "accuracy": scores[0]["accuracy"] - scores[1]["accuracy"],
        "nll": losses[0] - losses[1],
    }


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
    cells = sums[..., : _C * _C].reshape(*sums.shape[:-1], _C, _C)
    right, rows, calls = np.diagonal(cells, axis1=-2, axis2=-1), cells.sum(axis=-1), cells.sum(axis=-2)
    return (
        np.concatenate([right.sum(axis=-1, keepdims=True), right, right, right], axis=-1),
        np.concatenate([rows.sum(axis=-1, keepdims=True), calls, rows, (calls + rows) / 2], axis=-1),
    )


def _macro_f1_interval(sums_GK: Floats, f1_R: Floats, value: float, shares_F1: Sequence[Interval | None]) -> Interval:
    """Bias-corrected and stretched on the logit scale.

    Where no replicate differs (all right, or nothing), the least and the most of the classes' own intervals stand in.
    """
    if np.ptp(f1_R) < _TINY:
        shares = [share for share in shares_F1 if share]
        return [min((low for low, _ in shares), default=0.0), max((high for _, high in shares), default=1.0)]
    bias = norm.ppf(np.clip((f1_R < value).mean() + (f1_R == value).mean() / 2, 0.001, 0.999))
    quantiles = np.quantile(f1_R, norm.cdf(2 * bias + norm.ppf(_TAILS)))
    low, middle, high = logit(np.clip(quantiles, _TINY, 1 - _TINY))
    mass_GC = _class_mass(sums_GK)
    known_C = 1 / np.maximum(_rows_a_block(mass_GC), 1)
    stretch = float((known_C + (1 - known_C) * _stretch(mass_GC)).mean())
    low, high = expit(middle + stretch * (low - middle)), expit(middle + stretch * (high - middle))
    return [float(min(low, value)), float(max(high, value))]


def _mean_interval(mean_R: Floats, stretch: float) -> Interval:
    low, middle, high = np.quantile(mean_R, _TAILS)
    return [float(max(0.0, middle + stretch * (low - middle))), float(middle + stretch * (high - middle))]


def _class_mass(sums_GK: Floats) -> Floats:
    """Mean of rows and calls of each class in each block, the denominators of F1."""
    return _shares(sums_GK)[1][:, 1 + 2 * _C :]


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
    stretch: Floats = t.ppf(_TAILS[2], blocks_S - 1) / _Z * np.sqrt((blocks_S + 1) / (blocks_S - 1))
    return stretch


def _design_effect(right_G: Floats, whole_G: Floats) -> float:
    """Variance of a share by blocks over its variance by independent rows, at least 1 (Kish 1965, section 8.2)."""
    share = float(right_G.sum() / whole_G.sum())
    by_rows = whole_G.sum() * share * (1 - share)
    if len(right_G) < 2 or by_rows <= _TINY:
        return 1.0
    by_blocks = ((right_G - share * whole_G) ** 2).sum() * len(right_G) / (len(right_G) - 1)
    return float(max(1.0, by_blocks / by_rows))
