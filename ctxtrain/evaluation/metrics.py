"""Scores of predictions against labels, all from scikit-learn or as defined here.

Comes in: `logits_NC` (or probabilities) and `labels_N`, in the order of `LABELS`. Goes out: `Metrics`, the object that
`evaluate --json` prints.
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

from ctxtrain.labels import LABELS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ECE_BINS = 15


class ClassScores(TypedDict):
    precision: float
    recall: float
    f1: float
    support: int


class Metrics(TypedDict):
    """`confusion[i][j]` counts windows of class i predicted as j; `absent` names classes without windows.

    An absent class scores 0 and stays in the mean of `macro_f1`, so that a missing class never flatters.
    """

    accuracy: float
    macro_f1: float
    per_class: dict[str, ClassScores]
    confusion: list[list[int]]
    nll: float
    brier: float
    ece: float
    rows: int
    absent: list[str]


def evaluate_logits(logits_NC: Floats, labels_N: Ints, temperature: float = 1.0) -> Metrics:
    """All scores of a labelled set; `nll`, `brier` and `ece` are of softmax(logits / temperature)."""
    logits_NC = np.asarray(logits_NC, dtype=np.float64)
    predicted_N = logits_NC.argmax(axis=1)
    probabilities_NC = softmax(logits_NC / temperature, axis=1)
    classes = list(range(len(LABELS)))
    precision, recall, f1, support = precision_recall_fscore_support(
        labels_N, predicted_N, labels=classes, zero_division=0
    )
    return Metrics(
        accuracy=float(accuracy_score(labels_N, predicted_N)),
        macro_f1=float(f1.mean()),
        per_class={
            label: ClassScores(
                precision=float(precision[c]),
                recall=float(recall[c]),
                f1=float(f1[c]),
                support=int(support[c]),
            )
            for c, label in enumerate(LABELS)
        },
        confusion=confusion_matrix(labels_N, predicted_N, labels=classes).tolist(),
        nll=negative_log_likelihood(logits_NC / temperature, labels_N),
        brier=float(squared_errors(probabilities_NC, labels_N).mean()),
        ece=expected_calibration_error(probabilities_NC, labels_N),
        rows=len(labels_N),
        absent=[label for c, label in enumerate(LABELS) if not support[c]],
    )


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
    errors_N: Floats = ((probabilities_NC - np.eye(len(LABELS))[labels_N]) ** 2).sum(axis=1)
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
