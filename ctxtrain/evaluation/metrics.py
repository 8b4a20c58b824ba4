"""What says how good answers are: the registry `METRICS`, and all scores of a labelled set.

Comes in: `logits_NC` and `labels_N`, in the order of `LABELS`. Goes out: `Metrics`, the object that `evaluate --json`
prints. A new metric is an entry of `METRICS` and a row of docs/formats.md: files, schemas, intervals, terminal and
report take it from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

from ctxtrain.evaluation.scores import (
    ECE_BINS,
    Judged,
    calibration_gaps,
    confusion_scores,
    expected_calibration_error,
    mean_gap,
    squared_errors,
)
from ctxtrain.labels import LABELS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Metrics: TypeAlias = dict[str, Any]  # what `evaluate_logits` gives; its schema is `Scores` of storage/metrics_log.py
Place = Literal["scores", "baselines", "runs", "spread"]

CHIEF = "macro_f1"  # it chooses the epoch and the baseline to beat, and leads are in it


class ClassScores(TypedDict):
    precision: float
    recall: float
    f1: float
    support: int


# How a metric is computed


@dataclass(frozen=True)
class OfConfusion:
    """A function of confusion matrices of shape (…, 3, 3), of counts or weights, to shape (…,); its range is finite.

    `share_of_rows`: right rows over all rows, as accuracy is; its interval is that of a share.
    """

    scores: Callable[[Floats], Floats]
    share_of_rows: bool = False

    def value(self, judged: Judged) -> float:
        return float(self.scores(judged.confusion()))


@dataclass(frozen=True)
class MeanOfRows:
    """The mean of a number of each row, of shape (N,)."""

    rows: Callable[[Judged], Floats]

    def value(self, judged: Judged) -> float:
        return float(self.rows(judged).mean())


@dataclass(frozen=True)
class OwnSums:
    """Neither of the two: `columns` of each row, of shape (N, width), are added up, and `scores` takes the sums.

    `scores` maps sums of shape (…, width) and their rows of shape (…,) to shape (…,). Chance alone raises such a
    metric, as it does a calibration error. `exact` is the value as it is defined.
    """

    width: int
    columns: Callable[[Judged], Floats]
    scores: Callable[[Floats, Floats], Floats]
    exact: Callable[[Judged], float]

    def value(self, judged: Judged) -> float:
        return self.exact(judged)


@dataclass(frozen=True)
class Metric:
    """A score of all rows together.

    name        its key in files
    title       how the report names it
    short       how a line or a table of a terminal does
    narrow      how a table with many columns does
    lowest, highest     its range, which no interval leaves
    shown       "scores": the line under the table of classes; "baselines": beside the baselines, with differences;
                "runs": the table of several runs; "spread": mean and deviation in runs.json, as of those of "runs"
    """

    name: str
    title: str
    short: str
    narrow: str
    measure: OfConfusion | MeanOfRows | OwnSums
    lowest: float
    highest: float
    shown: tuple[Place, ...] = ()

    @property
    def of_calls(self) -> bool:
        """Whether it follows from the calls alone, so that no temperature changes it."""
        return isinstance(self.measure, OfConfusion)


def shown(where: Place) -> list[Metric]:
    """The metrics that are shown there.

    The tables of baselines and of runs, which show leads, begin with the metric of the leads.
    """
    found = [metric for metric in METRICS if where in metric.shown]
    return sorted(found, key=lambda metric: where in ("baselines", "runs") and metric.name != CHIEF)


# Scores of a labelled set


def evaluate_logits(logits_NC: Floats, labels_N: Ints, temperature: float = 1.0) -> Metrics:
    """All scores of a labelled set; those of probabilities are of softmax(logits / temperature).

    `confusion[i][j]` counts windows of class i called j; `absent` names classes without windows. An absent class scores
    0 and stays in the mean of `macro_f1`, so that a missing class never flatters.
    """
    judged = Judged.of_logits(logits_NC, labels_N, temperature)
    per_class = class_scores(judged)
    return {
        **{metric.name: metric.measure.value(judged) for metric in METRICS if metric.of_calls},
        "per_class": per_class,
        "confusion": judged.confusion().astype(np.int64).tolist(),
        **{metric.name: metric.measure.value(judged) for metric in METRICS if not metric.of_calls},
        "rows": len(labels_N),
        "absent": [label for label, scores in per_class.items() if not scores["support"]],
    }


def class_scores(judged: Judged) -> dict[str, ClassScores]:
    """Precision, recall, F1 and rows of each class."""
    scores = confusion_scores(judged.confusion())
    support_C = np.bincount(judged.labels_N, minlength=len(LABELS))
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


# The order is that of the keys in files and of the columns that the intervals add up: new ones go to the end.
METRICS = (
    Metric(
        name="accuracy",
        title="accuracy",
        short="accuracy",
        narrow="acc.",
        measure=OfConfusion(accuracy, share_of_rows=True),
        lowest=0.0,
        highest=1.0,
        shown=("scores", "baselines", "runs", "spread"),
    ),
    Metric(
        name=CHIEF,
        title="macro-F1",
        short="macro-F1",
        narrow="macro-F1",
        measure=OfConfusion(macro_f1),
        lowest=0.0,
        highest=1.0,
        shown=("scores", "baselines", "runs", "spread"),
    ),
    Metric(
        name="nll",
        title="negative log-likelihood",
        short="NLL",
        narrow="NLL",
        measure=MeanOfRows(lambda judged: judged.losses_N),
        lowest=0.0,
        highest=np.inf,
        shown=("scores", "baselines", "spread"),
    ),
    Metric(
        name="brier",
        title="Brier score",
        short="Brier",
        narrow="Brier",
        measure=MeanOfRows(lambda judged: squared_errors(judged.probabilities_NC, judged.labels_N)),
        lowest=0.0,
        highest=2.0,
    ),
    Metric(
        name="ece",
        title="expected calibration error",
        short="ECE",
        narrow="ECE",
        measure=OwnSums(
            width=ECE_BINS,
            columns=calibration_gaps,
            scores=mean_gap,
            exact=lambda judged: expected_calibration_error(judged.probabilities_NC, judged.labels_N),
        ),
        lowest=0.0,
        highest=1.0,
        shown=("scores", "spread"),
    ),
)
