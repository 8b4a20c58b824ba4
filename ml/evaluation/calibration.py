"""Temperature scaling, p' = softmax(logits / T) (Guo et al. 2017, "On Calibration of Modern Neural Networks", 4.2).

Comes in: validation logits and labels. Goes out: one temperature, with figures that were not fitted on the rows
they judge.
"""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import softmax

from ml.evaluation.metrics import ECE_BINS, expected_calibration_error, negative_log_likelihood

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LOWEST, HIGHEST = 0.05, 20.0
FOLDS = 5


class TemperatureScaler:
    """Fit and apply one temperature; `temperature_` stays 1 where it does not help, and `reason_` then says why.

    `before_` and `after_` hold NLL and ECE; `after_` is cross-fitted: each block of rows is judged with the
    temperature of the other blocks.
    """

    temperature_: float
    reason_: str | None
    before_: dict[str, float]
    after_: dict[str, float]

    def fit(self, logits_NC: Floats, labels_N: Ints) -> Self:
        logits_NC = np.asarray(logits_NC, dtype=np.float64)
        if not np.isfinite(logits_NC).all():
            self.temperature_, self.reason_, self.before_, self.after_ = 1.0, "the logits are not all finite", {}, {}
            return self
        self.before_ = _scores(logits_NC, labels_N)
        self.temperature_, self.reason_, self.after_ = 1.0, None, self.before_
        if len(np.unique(labels_N)) < 2 or len(labels_N) < 2 * FOLDS:
            self.reason_ = f"too few rows to fit a temperature: {len(labels_N)} of {len(np.unique(labels_N))} classes"
            return self
        crossed_NC = np.empty_like(logits_NC)
        for block in np.array_split(np.arange(len(labels_N)), FOLDS):
            others = np.setdiff1d(np.arange(len(labels_N)), block)
            crossed_NC[block] = logits_NC[block] / best_temperature(logits_NC[others], labels_N[others])
        crossed = _scores(crossed_NC, labels_N)
        if crossed["nll"] >= self.before_["nll"]:
            self.reason_ = "no temperature lowered the negative log-likelihood of rows that it was not fitted on"
            return self
        self.temperature_ = best_temperature(logits_NC, labels_N)
        self.after_ = crossed
        return self

    def predict_proba(self, logits_NC: Floats) -> Floats:
        probabilities: Floats = softmax(np.asarray(logits_NC, dtype=np.float64) / self.temperature_, axis=1)
        return probabilities

    def summary(self) -> dict[str, object]:
        return {
            "method": "temperature",
            "temperature": self.temperature_,
            "reason": self.reason_,
            "before": self.before_,
            "after": self.after_,
            "after_is": f"cross-fitted over {FOLDS} blocks of validation rows",
            "ece_bins": ECE_BINS,
        }


def best_temperature(logits_NC: Floats, labels_N: Ints) -> float:
    """The T in [0.05, 20] of least negative log-likelihood, which is unimodal in ln T: a bounded search finds it."""
    found = minimize_scalar(
        lambda log_t: negative_log_likelihood(logits_NC / np.exp(log_t), labels_N),
        bounds=(np.log(LOWEST), np.log(HIGHEST)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(found.x))


def _scores(logits_NC: Floats, labels_N: Ints) -> dict[str, float]:
    return {
        "nll": negative_log_likelihood(logits_NC, labels_N),
        "ece": expected_calibration_error(softmax(logits_NC, axis=1), labels_N),
    }
