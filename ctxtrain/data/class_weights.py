"""What an error on each class weighs in the loss.

Comes in: the windows per class of an oversampled epoch. Goes out: three weights.
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

    `auto` is inverse frequency with mean 1, over the counts *after* oversampling, so that the two never correct the
    same imbalance twice: fully oversampled classes weigh 1 each.
    """
    if weights == "none":
        return [1.0] * len(LABELS)
    if weights == "auto":
        inverse = 1.0 / counts_C
        return [float(weight) for weight in inverse / inverse.mean()]
    return [float(weight) for weight in weights]
