"""Formulas of scores: from confusion matrices, from the probabilities of single rows, and the calibration error.

Input: labels, logits or probabilities of shape (N, 3), classes in the order of `LABELS`. Output: scores over all rows,
per row, or per confusion matrix of a stack.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from ctxtrain.evaluation.probabilities import calibrated_probabilities
from ctxtrain.labels import LABELS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ECE_BINS = 15
_C = len(LABELS)


@dataclass(frozen=True)
class ScoredRows:
    """Labelled rows with a model's probabilities, predictions and losses.

    `predicted_NC` is one-hot, except for random predictions, where it holds the probability of predicting each class.
    `losses_N` is −ln p(true class).
    """

    labels_N: Ints
    probabilities_NC: Floats
    predicted_NC: Floats
    losses_N: Floats

    @classmethod
    def from_logits(cls, logits_NC: Floats, labels_N: Ints, temperature: float = 1.0) -> Self:
        """Rows predicted as their most probable class, with probabilities softmax(logits / temperature)."""
        logits_NC = np.asarray(logits_NC, dtype=np.float64)
        predicted_NC, losses_N = np.eye(_C)[logits_NC.argmax(axis=1)], log_losses(logits_NC / temperature, labels_N)
        return cls(labels_N, calibrated_probabilities(logits_NC, temperature), predicted_NC, losses_N)

    def confusion(self) -> Floats:
        """Confusion matrix of shape (3, 3), true class by predicted class."""
        confusion_CC: Floats = np.eye(_C)[self.labels_N].T @ self.predicted_NC
        return confusion_CC


class ConfusionScores(TypedDict):
    """Scores of one or more confusion matrices: `accuracy` and `macro_f1` of shape (…,), the others (…, 3)."""

    accuracy: Floats
    macro_f1: Floats
    precision: Floats
    recall: Floats
    f1: Floats


def confusion_scores(confusion_CC: Floats) -> ConfusionScores:
    """Scores of confusion matrices of shape (…, 3, 3), of counts or weights; 0 / 0 counts as 0."""
    correct_C = np.diagonal(confusion_CC, axis1=-2, axis2=-1)
    rows_C, predictions_C = confusion_CC.sum(axis=-1), confusion_CC.sum(axis=-2)
    f1_C = _ratio(2 * correct_C, rows_C + predictions_C)
    return ConfusionScores(
        accuracy=_ratio(correct_C.sum(axis=-1), rows_C.sum(axis=-1)),
        macro_f1=f1_C.mean(axis=-1),
        precision=_ratio(correct_C, predictions_C),
        recall=_ratio(correct_C, rows_C),
        f1=f1_C,
    )


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Quotient, 0 where the denominator is 0."""
    zeros = np.zeros(np.shape(numerator))
    return np.divide(numerator, denominator, out=zeros, where=np.asarray(denominator) > 0)


def negative_log_likelihood(logits_NC: Floats, labels_N: Ints) -> float:
    """Mean −ln p(true class), in nats."""
    return float(log_losses(logits_NC, labels_N).mean())


def log_losses(logits_NC: Floats, labels_N: Ints) -> Floats:
    """−ln p(true class) of each row, in nats, of shape (N,)."""
    losses_N: Floats = -log_softmax(logits_NC, axis=1)[np.arange(len(labels_N)), labels_N]
    return losses_N


def squared_errors(probabilities_NC: Floats, labels_N: Ints) -> Floats:
    """Σ_c (p_c − [c is the true class])² of each row, in [0, 2]; the mean is the Brier score (Brier 1950)."""
    errors_N: Floats = ((probabilities_NC - np.eye(_C)[labels_N]) ** 2).sum(axis=1)
    return errors_N


def expected_calibration_error(probabilities_NC: Floats, labels_N: Ints, bins: int = ECE_BINS) -> float:
    """Mean |accuracy − confidence| over bins of equal mass (Naeini et al. 2015; Nixon et al. 2019, section 3).

    Rows are sorted by confidence and split into `bins` groups of nearly equal size. With fewer rows than bins, each
    row is a bin.
    """
    confidence_N = probabilities_NC.max(axis=1)
    correct_N = probabilities_NC.argmax(axis=1) == labels_N
    groups = equal_mass_bins(confidence_N, bins)
    gaps = [abs(correct_N[group].mean() - confidence_N[group].mean()) * len(group) for group in groups]
    return float(sum(gaps) / len(labels_N))


def equal_mass_bins(confidence_N: Floats, bins: int = ECE_BINS) -> list[Ints]:
    """Row numbers of each bin, in order of confidence, lowest first; empty bins are dropped."""
    order = np.argsort(confidence_N, kind="stable")
    return [group for group in np.array_split(order, bins) if len(group)]


def calibration_gaps(scored: ScoredRows) -> Floats:
    """Correctness (1 or 0) minus confidence of each row, in the column of its bin, of shape (N, bins)."""
    confidence_N = scored.probabilities_NC.max(axis=1)
    gap_N = (scored.probabilities_NC.argmax(axis=1) == scored.labels_N) - confidence_N
    gaps_NK = np.zeros((len(gap_N), ECE_BINS))
    for bin_number, rows in enumerate(equal_mass_bins(confidence_N)):
        gaps_NK[rows, bin_number] = gap_N[rows]
    return gaps_NK


def calibration_error_from_sums(gaps_K: Floats, rows: Floats) -> Floats:
    """Expected calibration error from summed gaps of shape (…, bins) and row counts of shape (…,)."""
    gap: Floats = np.abs(gaps_K).sum(axis=-1) / rows
    return gap
