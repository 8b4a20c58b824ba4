"""Temperature scaling, p' = softmax(logits / T) (Guo et al. 2017, "On Calibration of Modern Neural Networks", 4.2).

Comes in: validation logits and labels. Goes out: one temperature, with figures that were not fitted on the rows
they judge.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import softmax

from ctxtrain.evaluation.metrics import METRICS
from ctxtrain.evaluation.scores import ECE_BINS, Judged, equal_mass_bins, negative_log_likelihood

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LOWEST, HIGHEST = 0.05, 20.0
FOLDS = 5


class TemperatureScaler:
    """Fit and apply one temperature; `temperature_` stays 1 where it does not help, and `reason_` then says why.

    `before_` and `after_` hold the metrics of probabilities, as NLL; `after_` is cross-fitted: each fold of rows is
    judged with the temperature of the other folds. `reliability_` holds a table for each of the two.
    """

    temperature_: float
    reason_: str | None
    before_: dict[str, float]
    after_: dict[str, float]
    reliability_: dict[str, list[dict[str, float]]]

    def fit(self, logits_NC: Floats, labels_N: Ints, block_N: Ints | None = None) -> Self:
        """`block_N` numbers blocks of windows that belong together (`blocks.py`): no block is split across folds."""
        logits_NC = np.asarray(logits_NC, dtype=np.float64)
        if not np.isfinite(logits_NC).all():
            self.temperature_, self.reason_, self.before_, self.after_ = 1.0, "the logits are not all finite", {}, {}
            return self
        self.before_ = _scores(logits_NC, labels_N)
        self.temperature_, self.reason_, self.after_ = 1.0, None, self.before_
        table = reliability(softmax(logits_NC, axis=1), labels_N)
        self.reliability_ = {"before": table, "after": table}
        if len(np.unique(labels_N)) < 2 or len(labels_N) < 2 * FOLDS:
            self.reason_ = f"too few rows to fit a temperature: {len(labels_N)} of {len(np.unique(labels_N))} classes"
            return self
        fold_N = folds(np.arange(len(labels_N)) if block_N is None else block_N)
        if fold_N.max() == 0:
            self.reason_ = "all windows are one block, so no temperature can be judged on rows that did not fit it"
            return self
        crossed_NC = np.empty_like(logits_NC)
        for fold in np.unique(fold_N):
            own, others = fold_N == fold, fold_N != fold
            crossed_NC[own] = logits_NC[own] / best_temperature(logits_NC[others], labels_N[others])
        crossed = _scores(crossed_NC, labels_N)
        if crossed["nll"] >= self.before_["nll"]:
            self.reason_ = "no temperature lowered the negative log-likelihood of rows that it was not fitted on"
            return self
        self.temperature_ = best_temperature(logits_NC, labels_N)
        self.after_ = crossed
        self.reliability_["after"] = reliability(softmax(crossed_NC, axis=1), labels_N)
        return self

    def predict_proba(self, logits_NC: Floats) -> Floats:
        probabilities: Floats = softmax(np.asarray(logits_NC, dtype=np.float64) / self.temperature_, axis=1)
        return probabilities

    def summary(self) -> dict[str, Any]:
        return {
            "method": "temperature",
            "temperature": self.temperature_,
            "reason": self.reason_,
            "before": self.before_,
            "after": self.after_,
            "after_is": f"cross-fitted over at most {FOLDS} folds of validation rows; no block is split",
            "ece_bins": ECE_BINS,
            "reliability": self.reliability_,
        }


def folds(block_N: Ints) -> Ints:
    """Fold of every row: blocks in their order, in at most 5 runs of like size, and no block in two."""
    sizes_G = np.bincount(block_N)
    middle_G = sizes_G.cumsum() - sizes_G / 2
    wanted_G = np.floor(FOLDS * middle_G / len(block_N)).astype(np.int64)
    numbers: Ints = np.unique(wanted_G, return_inverse=True)[1][block_N]
    return numbers


def reliability(probabilities_NC: Floats, labels_N: Ints) -> list[dict[str, float]]:
    """Mean confidence, accuracy and rows of each of the ECE's bins of equal mass, least confident first."""
    confidence_N = probabilities_NC.max(axis=1)
    correct_N = probabilities_NC.argmax(axis=1) == labels_N
    return [
        {
            "confidence": float(confidence_N[rows].mean()),
            "accuracy": float(correct_N[rows].mean()),
            "rows": len(rows),
        }
        for rows in equal_mass_bins(confidence_N)
    ]


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
    judged = Judged.of_logits(logits_NC, labels_N)
    return {metric.name: metric.measure.value(judged) for metric in METRICS if not metric.of_calls}
