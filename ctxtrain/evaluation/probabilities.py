"""Logits and a temperature → calibrated probabilities."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

Floats = NDArray[np.float64]


def calibrated_probabilities(logits_NC: Floats, temperature: float) -> Floats:
    """softmax(logits / temperature), in float64, of shape (N, 3); 1 leaves the probabilities of the model."""
    probabilities_NC: Floats = softmax(np.asarray(logits_NC, dtype=np.float64) / temperature, axis=1)
    return probabilities_NC
