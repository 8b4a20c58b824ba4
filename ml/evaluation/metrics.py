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

from ml.labels import LABELS

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
    ece: float
    rows: int
    absent: list[str]


def evaluate_logits(logits_NC: Floats, labels_N: Ints, temperature: float = 1.0) -> Metrics:
    """All scores of a labelled set; `nll` and `ece` are of softmax(logits / temperature)."""
    logits_NC = np.asarray(logits_NC, dtype=np.float64)
    predicted_N = logits_NC.argmax(axis=1)
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
        ece=expected_calibration_error(softmax(logits_NC / temperature, axis=1), labels_N),
        rows=len(labels_N),
        absent=[label for c, label in enumerate(LABELS) if not support[c]],
    )


def negative_log_likelihood(logits_NC: Floats, labels_N: Ints) -> float:
    """Mean −ln p(true class), in nats."""
    return float(-log_softmax(logits_NC, axis=1)[np.arange(len(labels_N)), labels_N].mean())


def expected_calibration_error(probabilities_NC: Floats, labels_N: Ints, bins: int = ECE_BINS) -> float:
    """Mean |accuracy − confidence| over bins of equal mass (Naeini et al. 2015; Nixon et al. 2019, section 3).

    Rows are sorted by confidence and cut into `bins` groups of like size; fewer rows than bins make one bin a row.
    """
    confidence_N = probabilities_NC.max(axis=1)
    correct_N = probabilities_NC.argmax(axis=1) == labels_N
    order = np.argsort(confidence_N, kind="stable")
    groups = [group for group in np.array_split(order, bins) if len(group)]
    gaps = [abs(correct_N[group].mean() - confidence_N[group].mean()) * len(group) for group in groups]
    return float(sum(gaps) / len(labels_N))
