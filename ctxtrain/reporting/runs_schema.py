"""The schema of `runs.json`: several runs of one config, with their spread and pooled scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, create_model

from ctxtrain.evaluation.metrics import METRICS
from ctxtrain.reporting.summary_schema import Baselines, BlockIntervals, RowCounts, Target
from ctxtrain.storage.metrics_log import MetricValues, Scores, Share, metric_schema
from ctxtrain.storage.validated import StoredModel

RUNS_VERSION: Literal[1] = 1
OF_EACH_RUN = [metric for metric in METRICS if {"runs", "spread"} & {*metric.views}]


class Spread(StoredModel):
    mean: float
    deviation: NonNegativeFloat
    lowest: float
    highest: float


class SpreadOfMetrics(StoredModel):
    lead: Spread

    def value(self, metric: str) -> Spread:
        """The spread of a metric, by its name in the registry."""
        spread: Spread = getattr(self, metric)
        return spread


if TYPE_CHECKING:
    MetricsOfRun = MetricValues  # mypy does not take a class that is made
    Spreads = SpreadOfMetrics
else:
    MetricsOfRun = metric_schema(OF_EACH_RUN)
    of_metrics = {metric.name: (Spread, ...) for metric in OF_EACH_RUN}
    Spreads = create_model("Spreads", __base__=SpreadOfMetrics, **of_metrics)


class BaselineOfRun(StoredModel):
    macro_f1: Share
    validation_macro_f1: Share


class MeanBaseline(BaselineOfRun):
    lead: float


class Run(MetricsOfRun):
    name: str
    seed: NonNegativeInt
    rows: RowCounts
    purged: dict[str, NonNegativeInt]
    epoch: PositiveInt
    skipped_steps: NonNegativeInt
    best_baseline: str
    lead: float
    beats_baseline: bool
    baselines: Annotated[dict[str, BaselineOfRun], Field(min_length=1)]
    baselines_left_out: dict[str, str]
    judged_on: str
    judged_rows_chose_the_epoch: bool
    leaked: str = ""


class PooledBaselines(Baselines):
    means: dict[str, MeanBaseline]


class Runs(StoredModel):
    """`version` rises when a key changes its meaning."""

    runs: Annotated[list[Run], Field(min_length=1)]
    version: Literal[1]
    leaked: str
    pooled: Scores
    baselines: PooledBaselines
    intervals: BlockIntervals
    targets: Annotated[list[Target], Field(min_length=1)]
    targets_met: bool
    spread: Spreads
