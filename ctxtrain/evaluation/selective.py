"""Selective prediction: the risk–coverage curve, confidence thresholds per class, and abstention.

Input: calibrated probabilities and labels. Output: the risk–coverage curve with its area, a threshold per class for a
target precision, and predictions under thresholds. A row abstains if its confidence is below the threshold of its
predicted class; its prediction is then SKIP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from ctxtrain.labels import LABELS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CURVE_POINTS = 20
MIN_PREDICTIONS = 10  # the precision of fewer predictions is too noisy to choose a threshold by
CONFIDENCE_MARGIN = 1e-5  # more than rounding changes a row's confidence between batches (docs/reliability.md, D6)
HISTOGRAM_EDGES = np.linspace(0.3, 1.0, 15)  # the most probable of three classes has at least 1/3
SKIP = LABELS.index("SKIP")


class Threshold(TypedDict):
    """The confidence threshold of a class: its predictions with at least `min_confidence` are kept.

    `precision` is that of the kept predictions, `calls` their number, and `coverage` their share of all predictions of
    the class. If no threshold reaches `wanted_precision`, `min_confidence` and `precision` are None.
    """

    wanted_precision: float
    min_confidence: float | None
    precision: float | None
    coverage: float
    calls: int


def risk_coverage(probabilities_NC: Floats, labels_N: Ints) -> dict[str, Any]:
    """The risk–coverage `curve` as {coverage, risk, confidence} at 20 coverages, and its area `aurc`.

    At coverage k/n, risk is the error rate of the k most confident rows, and confidence the lowest among them.
    AURC = (1/n) Σ_k risk of the k most confident (Geifman and El-Yaniv 2017, section 3; Ding et al. 2020). It equals
    the plug-in estimator Σ_i error_i (H_n − H_{i−1}) / n of Zhou et al. 2025, section 4. Rows of equal confidence share
    their mean error, so the result does not depend on the order of the rows.
    """
    confidence_N = probabilities_NC.max(axis=1)
    error_N = (probabilities_NC.argmax(axis=1) != labels_N).astype(np.float64)
    _, tie_N = np.unique(-confidence_N, return_inverse=True)
    mean_T = np.bincount(tie_N, error_N) / np.bincount(tie_N)
    sorted_N = mean_T[np.sort(tie_N)]
    risk_N = sorted_N.cumsum() / np.arange(1, len(sorted_N) + 1)
    counts = np.unique(np.ceil(len(sorted_N) * np.arange(1, CURVE_POINTS + 1) / CURVE_POINTS).astype(np.int64))
    descending_N = -np.sort(-confidence_N)
    curve = [
        {"coverage": int(k) / len(sorted_N), "risk": float(risk_N[k - 1]), "confidence": float(descending_N[k - 1])}
        for k in counts
    ]
    return {"aurc": float(risk_N.mean()), "curve": curve}


def confidence_histogram(probabilities_NC: Floats, labels_N: Ints) -> list[dict[str, float]]:
    """Counts of correct and wrong rows in 14 bins of confidence, 0.05 wide; the last bin includes 1."""
    confidence_N, correct_N = probabilities_NC.max(axis=1), probabilities_NC.argmax(axis=1) == labels_N
    right_B, wrong_B = (np.histogram(confidence_N[rows], HISTOGRAM_EDGES)[0] for rows in (correct_N, ~correct_N))
    bins = zip(HISTOGRAM_EDGES[:-1], HISTOGRAM_EDGES[1:], right_B, wrong_B, strict=True)
    return [
        {"from": round(float(low), 2), "to": round(float(high), 2), "right": int(right), "wrong": int(wrong)}
        for low, high, right, wrong in bins
    ]


def choose_thresholds(probabilities_NC: Floats, labels_N: Ints, targets: Mapping[str, float]) -> dict[str, Threshold]:
    """For each class of `targets`, the lowest threshold that keeps 10 predictions or more at the target precision.

    Thresholds are chosen and scored on the same rows, so the precision is optimistic. A threshold is lower than the
    lowest confidence that it keeps, so that rounding does not exclude that row: by 1e-5, or by half the distance to the
    next lower confidence if that is less.
    """
    predicted_N, confidence_N = probabilities_NC.argmax(axis=1), probabilities_NC.max(axis=1)
    thresholds = {}
    for label, precision in targets.items():
        rows = np.flatnonzero(predicted_N == LABELS.index(label))
        rows = rows[np.argsort(-confidence_N[rows], kind="stable")]
        confidence_K = confidence_N[rows]
        correct_K = (labels_N[rows] == LABELS.index(label)).cumsum()
        count_K = np.arange(1, len(rows) + 1)
        last_of_tie_K = np.append(confidence_K[:-1] != confidence_K[1:], True)[: len(rows)]
        reached = np.flatnonzero(last_of_tie_K & (correct_K / count_K >= precision) & (count_K >= MIN_PREDICTIONS))
        k = int(reached[-1]) if len(reached) else None
        bound_K = np.maximum(confidence_K - CONFIDENCE_MARGIN, (confidence_K + np.append(confidence_K[1:], 0.0)) / 2)
        thresholds[label] = Threshold(
            wanted_precision=precision,
            min_confidence=None if k is None else float(bound_K[k]),
            precision=None if k is None else float(correct_K[k] / count_K[k]),
            coverage=0.0 if k is None else (k + 1) / len(rows),
            calls=0 if k is None else k + 1,
        )
    return thresholds


def abstain(probabilities_NC: Floats, min_confidence_C: Floats) -> tuple[Ints, NDArray[np.bool_]]:
    """Predicted classes, SKIP for rows that abstain, and whether each row abstains: its confidence is too low."""
    predicted_N = probabilities_NC.argmax(axis=1)
    abstained_N = probabilities_NC.max(axis=1) < min_confidence_C[predicted_N]
    return np.where(abstained_N, SKIP, predicted_N), abstained_N


def min_confidence_by_class(thresholds: Mapping[str, float | None]) -> Floats:
    """Thresholds as an array by class. A missing class gets 0 (never abstain), None gets infinity (always abstain)."""
    values = [thresholds.get(label, 0.0) for label in LABELS]
    return np.array([np.inf if value is None else value for value in values])
