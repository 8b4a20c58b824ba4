"""Weight of each class in the loss.

Input: the windows per class of an oversampled epoch. Output: three weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ctxtrain.labels import LABELS

Ints = NDArray[np.int64]


def class_weights(counts_C: Ints, weights: Literal["auto", "none"] | Sequence[float]) -> list[float]:
    """Weight of each class in the loss.

    `auto` is inverse frequency with mean 1, from the counts *after* oversampling, so that oversampling and weights do
    not both correct the same imbalance: fully oversampled classes all have weight 1.
    """
    if weights == "none":
        return [1.0] * len(LABELS)
    if weights == "auto":
        inverse = 1.0 / counts_C
        return [float(weight) for weight in inverse / inverse.mean()]
    return [float(weight) for weight in weights]
