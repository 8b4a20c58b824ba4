"""The registry of metrics, `METRICS`, and the scores of a labelled set.

Input: `logits_NC` and `labels_N`, classes in the order of `LABELS`. Output: `Metrics`, the object that
`evaluate --json` prints. To add a metric, add an entry to `METRICS` and a row to docs/formats.md. Files, schemas,
intervals, terminal and report pick it up from `METRICS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

from ctxtrain.evaluation.metric_formulas import (
    ECE_BINS,
    ScoredRows,
    calibration_error_from_sums,
    calibration_gaps,
    confusion_scores,
    expected_calibration_error,
    squared_errors,
)
from ctxtrain.labels import LABELS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Metrics: TypeAlias = dict[str, Any]  # the result of `evaluate_logits`; its schema is `Scores` of storage/metrics_log.py
View = Literal["scores", "baselines", "runs", "spread"]

PRIMARY_METRIC = "macro_f1"  # selects the epoch and the best baseline; leads are differences in it


class ClassScores(TypedDict):
    precision: float
    recall: float
    f1: float
    support: int


# Ways to compute a metric


@dataclass(frozen=True)
class FromConfusion:
    """A function of confusion matrices of shape (…, 3, 3), of counts or weights, to shape (…,), with a finite range.

    `is_proportion`: the metric is correct rows over all rows, like accuracy, and gets the interval of a proportion.
    """

    compute: Callable[[Floats], Floats]
    is_proportion: bool = False

    def value(self, scored: ScoredRows) -> float:
        return float(self.compute(scored.confusion()))


@dataclass(frozen=True)
class MeanOverRows:
    """The mean of one number per row, of shape (N,)."""

    per_row: Callable[[ScoredRows], Floats]

    def value(self, scored: ScoredRows) -> float:
        return float(self.per_row(scored).mean())


@dataclass(frozen=True)
class FromColumnSums:
    """A function of sums over rows: `columns`, of shape (N, width), are summed and passed to `compute`.

    `compute` maps sums of shape (…, width) and row counts of shape (…,) to shape (…,). Noise biases such a metric
    upwards, as it does the calibration error. `exact` computes the value from its definition.
    """

    width: int
    columns: Callable[[ScoredRows], Floats]
    compute: Callable[[Floats, Floats], Floats]
    exact: Callable[[ScoredRows], float]

    def value(self, scored: ScoredRows) -> float:
        return self.exact(scored)


@dataclass(frozen=True)
class Metric:
    """A score over all rows.

    name        key in files
    title       name in the report
    short       name in a line or table on the terminal
    narrow      name in a table with many columns
    lowest, highest     range of the metric; intervals are clipped to it
    views       where it appears. "scores": the line under the table of classes; "baselines": the table of baselines,
                with differences; "runs": the table of several runs; "spread": mean and deviation in runs.json, which
                "runs" implies
    """

    name: str
    title: str
    short: str
    narrow: str
    measure: FromConfusion | MeanOverRows | FromColumnSums
    lowest: float
    highest: float
    views: tuple[View, ...] = ()

    @property
    def depends_only_on_predictions(self) -> bool:
        """Whether the metric ignores probabilities, so that no temperature changes it."""
        return isinstance(self.measure, FromConfusion)


def metrics_for(view: View) -> list[Metric]:
    """The metrics of a view; the tables of baselines and runs, which show leads, start with the primary metric."""
    metrics = [metric for metric in METRICS if view in metric.views]
    return sorted(metrics, key=lambda metric: view in ("baselines", "runs") and metric.name != PRIMARY_METRIC)


# Scores of a labelled set


def evaluate_logits(logits_NC: Floats, labels_N: Ints, temperature: float = 1.0) -> Metrics:
    """All scores of a labelled set, with probabilities softmax(logits / temperature).

    `confusion[i][j]` counts windows of class i predicted as j; `absent` names classes without windows. An absent class
    scores 0 and stays in the mean of `macro_f1`, so that a missing class never raises the score.
    """
    scored = ScoredRows.from_logits(logits_NC, labels_N, temperature)
    per_class = class_scores(scored)
    return {
        **{metric.name: metric.measure.value(scored) for metric in METRICS if metric.depends_only_on_predictions},
        "per_class": per_class,
        "confusion": scored.confusion().astype(np.int64).tolist(),
        **{metric.name: metric.measure.value(scored) for metric in METRICS if not metric.depends_only_on_predictions},
        "rows": len(labels_N),
        "absent": [label for label, scores in per_class.items() if not scores["support"]],
    }


def class_scores(scored: ScoredRows) -> dict[str, ClassScores]:
    """Precision, recall, F1 and number of rows of each class."""
    scores = confusion_scores(scored.confusion())
    support_C = np.bincount(scored.labels_N, minlength=len(LABELS))
    return {
        label: ClassScores(
            precision=float(scores["precision"][c]),
            recall=float(scores["recall"][c]),
            f1=float(scores["f1"][c]),
            support=int(support_C[c]),
        )
        for c, label in enumerate(LABELS)
    }


# The registry


def accuracy(confusion_CC: Floats) -> Floats:
    return confusion_scores(confusion_CC)["accuracy"]


def macro_f1(confusion_CC: Floats) -> Floats:
    return confusion_scores(confusion_CC)["macro_f1"]


# Add new metrics at the end: the order fixes the keys in files and the columns that the bootstrap sums.
METRICS = (
    Metric(
        name="accuracy",
        title="accuracy",
        short="accuracy",
        narrow="acc.",
        measure=FromConfusion(accuracy, is_proportion=True),
        lowest=0.0,
        highest=1.0,
        views=("scores", "baselines", "runs", "spread"),
    ),
    Metric(
        name=PRIMARY_METRIC,
        title="macro-F1",
        short="macro-F1",
        narrow="macro-F1",
        measure=FromConfusion(macro_f1),
        lowest=0.0,
        highest=1.0,
        views=("scores", "baselines", "runs", "spread"),
    ),
    Metric(
        name="nll",
        title="negative log-likelihood",
        short="NLL",
        narrow="NLL",
        measure=MeanOverRows(lambda scored: scored.losses_N),
        lowest=0.0,
        highest=np.inf,
        views=("scores", "baselines", "spread"),
    ),
    Metric(
        name="brier",
        title="Brier score",
        short="Brier",
        narrow="Brier",
        measure=MeanOverRows(lambda scored: squared_errors(scored.probabilities_NC, scored.labels_N)),
        lowest=0.0,
        highest=2.0,
    ),
    Metric(
        name="ece",
        title="expected calibration error",
        short="ECE",
        narrow="ECE",
        measure=FromColumnSums(
            width=ECE_BINS,
            columns=calibration_gaps,
            compute=calibration_error_from_sums,
            exact=lambda scored: expected_calibration_error(scored.probabilities_NC, scored.labels_N),
        ),
        lowest=0.0,
        highest=1.0,
        views=("scores", "spread"),
    ),
)
