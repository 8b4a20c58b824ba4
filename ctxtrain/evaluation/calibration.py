"""Temperature scaling, p' = softmax(logits / T) (Guo et al. 2017, "On Calibration of Modern Neural Networks", 4.2).

Input: validation logits and labels. Output: one temperature, with cross-fitted scores: no row is scored with a
temperature that was fitted on it.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from ctxtrain.evaluation.metric_formulas import ECE_BINS, ScoredRows, equal_mass_bins, negative_log_likelihood
from ctxtrain.evaluation.metrics import METRICS
from ctxtrain.evaluation.probabilities import calibrated_probabilities

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
FOLDS = 5


class TemperatureScaler:
    """Fit and apply one temperature. If none helps, `temperature_` is 1 and `reason_` says why.

    `before_` and `after_` hold the metrics that depend on probabilities, such as NLL. `after_` is cross-fitted: each
    fold of rows is scored with a temperature fitted on the other folds. `reliability_` holds a table for each of the
    two.
    """

    temperature_: float
    reason_: str | None
    before_: dict[str, float]
    after_: dict[str, float]
    reliability_: dict[str, list[dict[str, float]]]

    def fit(self, logits_NC: Floats, labels_N: Ints, block_N: Ints | None = None) -> Self:
        """Fit the temperature; no block of `block_N` (`blocks.py`) is split across folds."""
        logits_NC = np.asarray(logits_NC, dtype=np.float64)
        if not np.isfinite(logits_NC).all():
            self.temperature_, self.reason_, self.before_, self.after_ = 1.0, "the logits are not all finite", {}, {}
            return self
        self.before_ = _probability_scores(logits_NC, labels_N)
        self.temperature_, self.reason_, self.after_ = 1.0, None, self.before_
        table = reliability_table(calibrated_probabilities(logits_NC, 1.0), labels_N)
        self.reliability_ = {"before": table, "after": table}
        if len(np.unique(labels_N)) < 2 or len(labels_N) < 2 * FOLDS:
            self.reason_ = f"too few rows to fit a temperature: {len(labels_N)} of {len(np.unique(labels_N))} classes"
            return self
        fold_N = assign_folds(np.arange(len(labels_N)) if block_N is None else block_N)
        if fold_N.max() == 0:
            self.reason_ = "all windows are one block, so a temperature cannot be scored on rows it was not fitted on"
            return self
        scaled_NC = np.empty_like(logits_NC)
        for fold in np.unique(fold_N):
            inside_N = fold_N == fold
            scaled_NC[inside_N] = logits_NC[inside_N] / fit_temperature(logits_NC[~inside_N], labels_N[~inside_N])
        cross_fitted = _probability_scores(scaled_NC, labels_N)
        if cross_fitted["nll"] >= self.before_["nll"]:
            self.reason_ = "no temperature lowered the negative log-likelihood of rows it was not fitted on"
            return self
        self.temperature_ = fit_temperature(logits_NC, labels_N)
        self.after_ = cross_fitted
        self.reliability_["after"] = reliability_table(calibrated_probabilities(scaled_NC, 1.0), labels_N)
        return self

    def predict_proba(self, logits_NC: Floats) -> Floats:
        return calibrated_probabilities(logits_NC, self.temperature_)

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


def assign_folds(block_N: Ints) -> Ints:
    """The fold of each row: consecutive blocks in at most `FOLDS` folds of nearly equal size, no block split."""
    sizes_G = np.bincount(block_N)
    middle_G = sizes_G.cumsum() - sizes_G / 2
    fold_G = np.floor(FOLDS * middle_G / len(block_N)).astype(np.int64)
    fold_N: Ints = np.unique(fold_G, return_inverse=True)[1][block_N]
    return fold_N


def reliability_table(probabilities_NC: Floats, labels_N: Ints) -> list[dict[str, float]]:
    """Mean confidence, accuracy and number of rows of each ECE bin, lowest confidence first."""
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


def fit_temperature(logits_NC: Floats, labels_N: Ints) -> float:
    """The T in [0.05, 20] with the lowest negative log-likelihood, by bounded search: it is unimodal in ln T."""
    optimum = minimize_scalar(
        lambda log_t: negative_log_likelihood(logits_NC / np.exp(log_t), labels_N),
        bounds=(np.log(MIN_TEMPERATURE), np.log(MAX_TEMPERATURE)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(optimum.x))


def _probability_scores(logits_NC: Floats, labels_N: Ints) -> dict[str, float]:
    scored = ScoredRows.from_logits(logits_NC, labels_N)
    return {metric.name: metric.measure.value(scored) for metric in METRICS if not metric.depends_only_on_predictions}
