"""Answering only when sure: what it costs, what it gains, and from which confidence on.

Comes in: calibrated probabilities and labels. Goes out: the risk–coverage curve with its area, a confidence threshold
per class for a wanted precision, and calls under thresholds: a row below its class's threshold is called SKIP.
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
FEWEST_CALLS = 10  # a precision of fewer calls says nothing
ROOM = 1e-5  # what a row's confidence may lose in other company: batches differ by rounding (docs/reliability.md, D6)
HISTOGRAM_EDGES = np.linspace(0.3, 1.0, 15)  # the likeliest of three classes has at least a third
SKIP = LABELS.index("SKIP")


class Threshold(TypedDict):
    """Calls of a class with at least `min_confidence` had this `precision`; None: no confidence reached it.

    `coverage` is the share of the class's calls that are kept, `calls` their number.
    """

    wanted_precision: float
    min_confidence: float | None
    precision: float | None
    coverage: float
    calls: int


def risk_coverage(probabilities_NC: Floats, labels_N: Ints) -> dict[str, Any]:
    """`aurc` and `curve`: {coverage, risk, confidence} at 20 coverages; risk is the share of errors among the rows
    answered, confidence the least of them.

    Rows are answered from the most confident on. AURC = (1/n) Σ_k risk of the k most confident (Geifman and El-Yaniv
    2017, section 3; Ding et al. 2020), which is the plug-in estimator Σ_i error_i (H_n − H_{i−1}) / n of Zhou et al.
    2025, section 4. Rows of equal confidence share their mean error, so that the order of the rows plays no part.
    """
    confidence_N = probabilities_NC.max(axis=1)
    error_N = (probabilities_NC.argmax(axis=1) != labels_N).astype(np.float64)
    _, tie_N = np.unique(-confidence_N, return_inverse=True)
    mean_T = np.bincount(tie_N, error_N) / np.bincount(tie_N)
    sorted_N = mean_T[np.sort(tie_N)]
    risk_N = sorted_N.cumsum() / np.arange(1, len(sorted_N) + 1)
    counts = np.unique(np.ceil(len(sorted_N) * np.arange(1, CURVE_POINTS + 1) / CURVE_POINTS).astype(np.int64))
    least_N = -np.sort(-confidence_N)
    curve = [
        {"coverage": int(k) / len(sorted_N), "risk": float(risk_N[k - 1]), "confidence": float(least_N[k - 1])}
        for k in counts
    ]
    return {"aurc": float(risk_N.mean()), "curve": curve}


def confidence_histogram(probabilities_NC: Floats, labels_N: Ints) -> list[dict[str, float]]:
    """Rows called right and called wrong in 14 bins of confidence, 0.05 wide, of which the last holds 1 too."""
    confidence_N, correct_N = probabilities_NC.max(axis=1), probabilities_NC.argmax(axis=1) == labels_N
    right, wrong = (np.histogram(confidence_N[own], HISTOGRAM_EDGES)[0] for own in (correct_N, ~correct_N))
    bins = zip(HISTOGRAM_EDGES[:-1], HISTOGRAM_EDGES[1:], right, wrong, strict=True)
    return [
        {"from": round(float(low), 2), "to": round(float(high), 2), "right": int(hits), "wrong": int(misses)}
        for low, high, hits, misses in bins
    ]


def choose_thresholds(probabilities_NC: Floats, labels_N: Ints, wanted: Mapping[str, float]) -> dict[str, Threshold]:
    """For each class of `wanted`, the least confidence whose calls reach the wanted precision: the largest coverage.

    Chosen and scored on the same rows, so the precision flatters. Fewer than 10 calls are no evidence. The confidence
    lies below that of the least confident row kept, by 1e-5 or half the way to the next row, so that rounding does not
    part that row from the calls it was counted with.
    """
    called_N, confidence_N = probabilities_NC.argmax(axis=1), probabilities_NC.max(axis=1)
    chosen = {}
    for label, precision in wanted.items():
        own = np.flatnonzero(called_N == LABELS.index(label))
        own = own[np.argsort(-confidence_N[own], kind="stable")]
        confidence_K = confidence_N[own]
        right_K = (labels_N[own] == LABELS.index(label)).cumsum()
        calls_K = np.arange(1, len(own) + 1)
        last_of_tie_K = np.append(confidence_K[:-1] != confidence_K[1:], True)[: len(own)]
        good = np.flatnonzero(last_of_tie_K & (right_K / calls_K >= precision) & (calls_K >= FEWEST_CALLS))
        k = int(good[-1]) if len(good) else None
        bound_K = np.maximum(confidence_K - ROOM, (confidence_K + np.append(confidence_K[1:], 0.0)) / 2)
        chosen[label] = Threshold(
            wanted_precision=precision,
            min_confidence=None if k is None else float(bound_K[k]),
            precision=None if k is None else float(right_K[k] / calls_K[k]),
            coverage=0.0 if k is None else (k + 1) / len(own),
            calls=0 if k is None else k + 1,
        )
    return chosen


def abstain(probabilities_NC: Floats, least_C: Floats) -> tuple[Ints, NDArray[np.bool_]]:
    """Class called and whether the row abstains: its confidence is below `least_C` of its likeliest class."""
    called_N = probabilities_NC.argmax(axis=1)
    abstained_N = probabilities_NC.max(axis=1) < least_C[called_N]
    return np.where(abstained_N, SKIP, called_N), abstained_N


def least_confidences(thresholds: Mapping[str, float | None]) -> Floats:
    """Thresholds as an array by class: none stored is 0 (never abstain), None is infinity (always abstain)."""
    least = [thresholds.get(label, 0.0) for label in LABELS]
    return np.array([np.inf if value is None else value for value in least])
