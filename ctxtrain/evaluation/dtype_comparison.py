"""What the dtype changes: one set of rows, answered in float32 and in bfloat16.

Input: `logits_NC` in each dtype, labels and temperature. Output: how many labels change, the largest differences of
a logit and of a calibrated probability, and the macro-F1 in each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from ctxtrain.evaluation.metrics import PRIMARY_METRIC, evaluate_logits
from ctxtrain.evaluation.probabilities import calibrated_probabilities

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class DtypeComparison(TypedDict):
    """`macro_f1` is by dtype; the label of a row is its most likely class, without thresholds."""

    rows: int
    labels_changed: int
    max_logit_difference: float
    max_probability_difference: float
    macro_f1: dict[str, float]


def compare_dtypes(logits: Mapping[str, Floats], labels_N: Ints, temperature: float) -> DtypeComparison:
    """Compare logits of shape (N, 3) of the same rows, by dtype: exactly two."""
    first_NC, second_NC = logits.values()
    p_NC, q_NC = (calibrated_probabilities(logits_NC, temperature) for logits_NC in (first_NC, second_NC))
    return DtypeComparison(
        rows=len(labels_N),
        labels_changed=int((p_NC.argmax(axis=1) != q_NC.argmax(axis=1)).sum()),
        max_logit_difference=float(np.abs(first_NC - second_NC).max()),
        max_probability_difference=float(np.abs(p_NC - q_NC).max()),
        macro_f1={
            dtype: evaluate_logits(logits_NC, labels_N, temperature)[PRIMARY_METRIC]
            for dtype, logits_NC in sorted(logits.items(), reverse=True)  # float32 first
        },
    )
