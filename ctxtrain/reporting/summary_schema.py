"""The schema of `training_summary.json`, which the report, the tables and the trackers read.

A summary may have more keys. Those below are required and typed, so that a file that was cut, edited or written by
another version is refused with the name of the key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ctxtrain.config.value_types import ExportDtype
from ctxtrain.evaluation.comparison import Finding
from ctxtrain.evaluation.metrics import METRICS, metrics_for
from ctxtrain.evaluation.worst_errors import COLUMNS, Column
from ctxtrain.labels import Label
from ctxtrain.reporting.curve_schema import LearningCurve
from ctxtrain.storage.metrics_log import EpochRecord, MetricValues, Scores, Share, metric_schema
from ctxtrain.storage.validated import StoredModel

SUMMARY_VERSION: Literal[1] = 1
Interval = Annotated[list[float], Field(min_length=2, max_length=2)]
Counts = Annotated[dict[Label, NonNegativeInt], Field(min_length=3, max_length=3)]
Floats = Annotated[dict[Label, float], Field(min_length=3, max_length=3)]


class Model(StoredModel):
    base: str
    revision: str | None
    family: str
    base_sha256: str
    parameters: PositiveInt
    trainable: PositiveInt
    trainable_share: Share


class Extent(StoredModel):
    symbols: list[str]
    first_event: str | None
    last_event: str | None


class Leak(StoredModel):
    kind: str
    files: list[str]
    count: NonNegativeInt
    examples: list[list[str]]
    refused: bool
    remedy: str


class Drift(StoredModel):
    feature: str
    psi: float
    chance: float
    shifted: bool


class RowCounts(StoredModel):
    __pydantic_extra__: dict[str, PositiveInt]  # other files, as test

    train: PositiveInt
    val: PositiveInt

    def by_file(self) -> dict[str, int]:
        return dict(self)


class Augmentation(StoredModel):
    mirror: bool
    crop: bool
    mirrored_rows: NonNegativeInt
    unchanged_fields: list[str]


class Data(StoredModel):
    rows: RowCounts
    purged: dict[str, NonNegativeInt]
    sha256: dict[str, str]
    classes: dict[str, Counts]
    before_oversampling: Counts
    after_oversampling: Counts
    class_weights: Floats
    augmentation: Augmentation
    codec: str
    partial_fields: dict[str, NonNegativeInt]
    noticed: dict[str, list[str]]
    longest_text_tokens: Annotated[dict[str, NonNegativeInt], Field(min_length=1)]
    rows_cut_to_max_tokens: dict[str, NonNegativeInt]
    leaks: list[Leak]
    leaked: str
    unchecked: list[str]
    drift: list[Drift]
    extent: dict[str, Extent]

    @model_validator(mode="after")
    def _classes_of_each_file(self) -> Self:
        missing = [name for name in self.rows.by_file() if name not in self.classes]
        if missing:
            raise ValueError(f"classes must have every file of rows, and lacks {', '.join(missing)}")
        return self


class Best(Scores):
    epoch: PositiveInt


class Averaging(StoredModel):
    wanted: PositiveInt
    epochs: Annotated[list[PositiveInt], Field(min_length=1)]
    macro_f1: Share | None
    best_epoch_macro_f1: Share | None
    used: bool
    reason: str


class Target(StoredModel):
    metric: str
    target: float
    value: float
    met: bool
    priority: str
    interval: Interval | None
    verdict: str


class ClassIntervals(StoredModel):
    precision: Interval | None
    recall: Interval | None
    f1: Interval | None


class ScoreIntervals(StoredModel):
    accuracy: Interval | None
    macro_f1: Interval | None
    ece: Interval | None
    per_class: Annotated[dict[Label, ClassIntervals], Field(min_length=3, max_length=3)]


class BlockIntervals(StoredModel):
    blocks: PositiveInt
    block: str
    doubt: str | None
    scores: ScoreIntervals


class Intervals(BlockIntervals):
    trusted: bool


if TYPE_CHECKING:
    BesideBaselines = MetricValues  # mypy does not take a class that is made
    Probabilistic = MetricValues
else:
    BesideBaselines = metric_schema(metrics_for("baselines"))
    Probabilistic = metric_schema(metric for metric in METRICS if not metric.depends_only_on_predictions)


class Lead(StoredModel):
    value: float
    interval: Interval | None


class LeadOverChance(Lead):
    """`looks` is the number of models that the leader was chosen from on the same rows; the interval allows for it."""

    looks: PositiveInt


class Leads(StoredModel):
    macro_f1: Lead


class Baseline(BesideBaselines):
    validation_macro_f1: Share
    difference: Leads
    over_chance: LeadOverChance | None


class Baselines(StoredModel):
    scores: Annotated[dict[str, Baseline], Field(min_length=1)]
    left_out: dict[str, str]
    best: str
    best_without_input: str
    finding: Finding
    use: str | None

    @model_validator(mode="after")
    def _named(self) -> Self:
        if not {self.best, self.best_without_input} <= self.scores.keys():
            raise ValueError(f"best and best_without_input must be among the scores, {', '.join(self.scores)}")
        return self


class Bin(StoredModel):
    confidence: Share
    accuracy: Share
    rows: PositiveInt


class Tables(StoredModel):
    before: list[Bin]
    after: list[Bin]


class Calibrated(StoredModel):
    method: Literal["temperature"]
    temperature: PositiveFloat
    reason: str | None
    before: Probabilistic
    after: Probabilistic
    after_is: str
    reliability: Tables


class Uncalibrated(StoredModel):
    method: Literal["none"]
    temperature: PositiveFloat


class Called(StoredModel):
    low: float = Field(alias="from")
    high: float = Field(alias="to")
    right: NonNegativeInt
    wrong: NonNegativeInt


class Point(StoredModel):
    coverage: Share
    risk: Share
    confidence: Share


class Threshold(StoredModel):
    wanted_precision: float
    min_confidence: float | None
    precision: float | None
    coverage: Share
    calls: NonNegativeInt


class Selective(StoredModel):
    aurc: float
    curve: list[Point]
    histogram: list[Called]
    thresholds: dict[Label, Threshold]


class Mistake(StoredModel):
    id: str | None
    place: str
    symbol: str | None
    time: str | None
    text: str | None
    bars: dict[Column, list[float]]
    event: dict[str, float]
    label: Label
    called: Label
    probabilities: Floats

    @model_validator(mode="after")
    def _whole_bars(self) -> Self:
        if self.bars and (
            not {*COLUMNS} - {"volume"} <= self.bars.keys() or len(set(map(len, self.bars.values()))) > 1
        ):
            raise ValueError("bars must have open, high, low and close, equally many of each")
        return self


class ExportCheck(StoredModel):
    dtype: ExportDtype
    rows: NonNegativeInt
    max_logit_difference: NonNegativeFloat
    allowed: PositiveFloat


class Summary(StoredModel):
    """`version` rises when a key changes its meaning; a summary of another version is refused."""

    verdict: str
    version: Literal[1]
    model: Model
    data: Data
    epochs: Annotated[list[EpochRecord], Field(min_length=1)]
    unfinished: str | None
    skipped_steps: NonNegativeInt
    best: Best
    averaging: Averaging | None
    test: Scores | None
    targets: Annotated[list[Target], Field(min_length=1)]
    targets_judged_on: str
    chosen_on: str
    judged_rows_chose_the_epoch: bool
    targets_met: bool
    intervals: Intervals
    baselines: Baselines
    calibration: Annotated[Calibrated | Uncalibrated, Field(discriminator="method")]
    selective: Selective
    mistakes: list[Mistake]
    export_check: ExportCheck
    environment: dict[str, str | int]
    files: dict[str, str]
    learning_curve: LearningCurve | None = None

    @property
    def judged(self) -> Scores:
        """Scores on the test rows; without them, on the validation rows."""
        return self.test or self.best

    @property
    def exported_epochs(self) -> str:
        """The epochs whose weights were exported, in words."""
        if self.averaging is None or not self.averaging.used:
            return f"epoch {self.best.epoch}"
        return f"mean of epochs {', '.join(map(str, sorted(self.averaging.epochs)))}"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if "macro_f1" not in {target.metric for target in self.targets}:
            raise ValueError("targets must have one of macro_f1")
        if self.best.epoch not in {epoch.epoch for epoch in self.epochs}:
            raise ValueError(f"best.epoch must be one of epochs, got {self.best.epoch}")
        sizes = [point.windows for point in self.learning_curve.points] if self.learning_curve else []
        if sorted({*sizes, self.data.rows.train}) != [*sizes, self.data.rows.train]:
            raise ValueError(f"learning_curve.points must ascend to less than data.rows.train, got windows {sizes}")
        return self
