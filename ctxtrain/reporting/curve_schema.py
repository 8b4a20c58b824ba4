"""The schema of `learning_curve` in `training_summary.json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from ctxtrain.labels import Label
from ctxtrain.storage.metrics_log import Share
from ctxtrain.storage.validated import StoredModel


class CurvePoint(StoredModel):
    """Scores after training on `windows` of the training windows: of the model, and of the best baseline."""

    windows: PositiveInt
    classes: Annotated[dict[Label, NonNegativeInt], Field(min_length=3, max_length=3)]
    epoch: PositiveInt
    macro_f1: Share
    best_baseline: str
    baseline_macro_f1: Share


class LeftOut(StoredModel):
    windows: PositiveInt
    reason: str


class LearningCurve(StoredModel):
    """`points` by number of windows; a size that could not be trained on is in `left_out`."""

    points: list[CurvePoint]
    left_out: list[LeftOut]

    def misses(self, sizes: Sequence[int]) -> list[int]:
        """The sizes that are neither computed nor left out."""
        return sorted({*sizes} - {point.windows for point in self.points} - {one.windows for one in self.left_out})
