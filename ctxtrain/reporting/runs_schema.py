"""The schema of `runs.json`: several runs of one config as the table and the verdict of several runs read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, create_model

from ctxtrain.evaluation.metrics import METRICS
from ctxtrain.reporting.summary_schema import Baselines, BlockIntervals, RowCounts, Target
from ctxtrain.storage.metrics_log import Measured, Scores, Share, overall
from ctxtrain.storage.validated import Part

RUNS_VERSION: Literal[1] = 1
OF_EACH_RUN = [metric for metric in METRICS if {"runs", "spread"} & {*metric.shown}]


class Spread(Part):
    mean: float
    deviation: NonNegativeFloat
    lowest: float
    highest: float


class SpreadOfMetrics(Part):
    lead: Spread

    def value(self, metric: str) -> Spread:
        """That of a metric, by its name in the registry."""
        found: Spread = getattr(self, metric)
        return found


if TYPE_CHECKING:
    MetricsOfRun = Measured  # mypy does not take a class that is made
    Spreads = SpreadOfMetrics
else:
    MetricsOfRun = overall(OF_EACH_RUN)
    of_metrics = {metric.name: (Spread, ...) for metric in OF_EACH_RUN}
    Spreads = create_model("Spreads", __base__=SpreadOfMetrics, **of_metrics)


class BaselineOfRun(Part):
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


class Runs(Part):
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
