"""Formulas of scores: of confusion matrices, of the probabilities of a row, and the error of calibration.

Comes in: labels, logits or probabilities of shape (N, 3) in the order of `LABELS`. Goes out: numbers of all rows, of
each row, or of each of many confusion matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax

from ctxtrain.labels import LABELS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ECE_BINS = 15
_C = len(LABELS)


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

    @classmethod
    def of_logits(cls, logits_NC: Floats, labels_N: Ints, temperature: float = 1.0) -> Self:
        """Each row is called its likeliest class, with probabilities softmax(logits / temperature)."""
        logits_NC = np.asarray(logits_NC, dtype=np.float64)
        called_NC, scaled_NC = np.eye(_C)[logits_NC.argmax(axis=1)], logits_NC / temperature
        return cls(labels_N, softmax(scaled_NC, axis=1), called_NC, log_losses(scaled_NC, labels_N))

    def confusion(self) -> Floats:
        """Rows by true class and called class, of shape (3, 3)."""
        confusion_CC: Floats = np.eye(_C)[self.labels_N].T @ self.called_NC
        return confusion_CC


class ConfusionScores(TypedDict):
    """Scores of one or of many confusion matrices: `accuracy` and `macro_f1` of shape (…,), the others (…, 3)."""

    accuracy: Floats
    macro_f1: Floats
    precision: Floats
    recall: Floats
    f1: Floats


def confusion_scores(confusion_CC: Floats) -> ConfusionScores:
    """Scores of matrices of shape (…, 3, 3), true class by called class, of counts or weights; 0 where 0 / 0."""
    right_C = np.diagonal(confusion_CC, axis1=-2, axis2=-1)
    rows_C, calls_C = confusion_CC.sum(axis=-1), confusion_CC.sum(axis=-2)
    f1_C = _ratio(2 * right_C, rows_C + calls_C)
    return ConfusionScores(
        accuracy=_ratio(right_C.sum(axis=-1), rows_C.sum(axis=-1)),
        macro_f1=f1_C.mean(axis=-1),
        precision=_ratio(right_C, calls_C),
        recall=_ratio(right_C, rows_C),
        f1=f1_C,
    )


def _ratio(part: Floats, whole: Floats) -> Floats:
    return np.divide(part, whole, out=np.zeros(np.shape(part)), where=np.asarray(whole) > 0)


def negative_log_likelihood(logits_NC: Floats, labels_N: Ints) -> float:
    """Mean −ln p(true class), in nats."""
    return float(log_losses(logits_NC, labels_N).mean())


def log_losses(logits_NC: Floats, labels_N: Ints) -> Floats:
    """−ln p(true class) of every row, in nats, of shape (rows,)."""
    losses_N: Floats = -log_softmax(logits_NC, axis=1)[np.arange(len(labels_N)), labels_N]
    return losses_N


def squared_errors(probabilities_NC: Floats, labels_N: Ints) -> Floats:
    """Σ_c (p_c − [c is the true class])² of every row, in [0, 2]; the mean is Brier's score (Brier 1950)."""
    errors_N: Floats = ((probabilities_NC - np.eye(_C)[labels_N]) ** 2).sum(axis=1)
    return errors_N


def expected_calibration_error(probabilities_NC: Floats, labels_N: Ints, bins: int = ECE_BINS) -> float:
    """Mean |accuracy − confidence| over bins of equal mass (Naeini et al. 2015; Nixon et al. 2019, section 3).

    Rows are sorted by confidence and cut into `bins` groups of like size; fewer rows than bins make one bin a row.
    """
    confidence_N = probabilities_NC.max(axis=1)
    correct_N = probabilities_NC.argmax(axis=1) == labels_N
    groups = equal_mass_bins(confidence_N, bins)
    gaps = [abs(correct_N[group].mean() - confidence_N[group].mean()) * len(group) for group in groups]
    return float(sum(gaps) / len(labels_N))


def equal_mass_bins(confidence_N: Floats, bins: int = ECE_BINS) -> list[Ints]:
    """Row numbers of each bin, from the least confident bin to the most; empty bins are left out."""
    order = np.argsort(confidence_N, kind="stable")
    return [group for group in np.array_split(order, bins) if len(group)]


def calibration_gaps(judged: Judged) -> Floats:
    """Right or not (1 or 0) less confidence of each row, in the column of its bin, of shape (N, bins)."""
    confidence_N = judged.probabilities_NC.max(axis=1)
    gap_N = (judged.probabilities_NC.argmax(axis=1) == judged.labels_N) - confidence_N
    gaps_NK = np.zeros((len(gap_N), ECE_BINS))
    for bin_number, rows in enumerate(equal_mass_bins(confidence_N)):
        gaps_NK[rows, bin_number] = gap_N[rows]
    return gaps_NK


def mean_gap(gaps_K: Floats, rows: Floats) -> Floats:
    """The calibration error from summed gaps of shape (…, bins)."""
    gap: Floats = np.abs(gaps_K).sum(axis=-1) / rows
    return gap
