"""The learning curve of a run: model and baselines trained anew on parts of its training rows.

Input: the rows of a finished run, and functions that build its learner and load what that has trained. Output: for each
size a `CurvePoint`, or a `LeftOut` with the reason. Nothing is written but the summary of the run, by the caller.

All points are scored on the rows that the run is judged on, and their epoch is chosen on the validation rows, as in the
run. The last point of the curve, all training rows, is the run itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ctxtrain.config.value_types import ExportDtype
from ctxtrain.data.batches import steps_per_epoch
from ctxtrain.data.dataset import Dataset
from ctxtrain.data.oversampling import by_label, class_counts
from ctxtrain.data.part import take_part
from ctxtrain.data.token_store import TokenStore
from ctxtrain.engine.api import EngineChoice
from ctxtrain.errors import ConfigError, DataError, TrainingDiverged
from ctxtrain.evaluation.baselines import best_on_validation, fit_baselines
from ctxtrain.evaluation.best_epoch import rank_epochs
from ctxtrain.evaluation.metrics import PRIMARY_METRIC
from ctxtrain.export.choose import choose_weights, exported_macro_f1
from ctxtrain.labels import LABELS
from ctxtrain.memory import release_memory
from ctxtrain.model.averaging import Candidates
from ctxtrain.model.lora import trainable_state
from ctxtrain.progress import Reporter
from ctxtrain.reporting.curve_schema import CurvePoint, LearningCurve, LeftOut
from ctxtrain.reporting.summary_schema import Summary
from ctxtrain.reporting.verdict import leak_mark, readable
from ctxtrain.runtime import Purpose, generator
from ctxtrain.storage.checkpoint import TrainState
from ctxtrain.storage.run_folder import RunFolder
from ctxtrain.training.epoch import Loop, run_steps
from ctxtrain.training.step import Learner
from ctxtrain.training.validation import validate

Ints = NDArray[np.int64]
Weights = Mapping[str, Tensor]
SAME_RUN = ("model", "data", "epochs")  # of two summaries; the epochs have the scores of each, and so show its settings


def part_order(labels_N: Ints, seed: int) -> Ints:
    """All row numbers, ordered so that the first n are a part of n rows: each part is within every larger one.

    The rows of a class stand in random order at (i + 1/2) / rows of the class, by the divisors of Webster's method. So
    each class keeps its share in every part. The first row of each class comes before all others.
    """
    places_N = np.zeros(len(labels_N))
    for label in range(len(LABELS)):
        rows = generator(seed, Purpose.PART, label).permutation(np.flatnonzero(labels_N == label))
        places_N[rows] = (np.arange(len(rows)) + 0.5) / max(1, len(rows))
        places_N[rows[:1]] -= 1
    return np.argsort(places_N, kind="stable")


def too_large(sizes: Sequence[int] | None, rows: int) -> list[str]:
    """A note that names the sizes which are not below the number of training rows; empty if there are none."""
    names = [f"{size:,}" for size in sizes or () if size >= rows]
    return [f"evaluation.learning_curve leaves out {', '.join(names)}: {_whole(rows)}"] if names else []


def _whole(rows: int) -> str:
    return f"the run itself trains on {rows:,} windows"


def begin_curve(summary: Summary, sizes: Sequence[int] | None, folder: RunFolder) -> Summary:
    """The new summary of a run with what is known of its curve: points in the folder's summary, and sizes too large.

    Without sizes, and for a run that is not finished, the summary stays as it is.
    """
    if sizes is None or summary.unfinished:
        return summary
    earlier = None
    with suppress(OSError, DataError):  # there is none, or it is damaged
        earlier = folder.read_summary()
    rows, curve = summary.data.rows.train, LearningCurve(points=[], left_out=[])
    if earlier and earlier.learning_curve and all(getattr(earlier, key) == getattr(summary, key) for key in SAME_RUN):
        curve = earlier.learning_curve
    entries: list[CurvePoint | LeftOut] = [*curve.points, *curve.left_out]
    known = [entry for entry in entries if entry.windows in sizes and entry.windows < rows]
    found = summary.model_copy(update={"learning_curve": LearningCurve(points=[], left_out=[])})
    for entry in (*known, *(LeftOut(windows=size, reason=_whole(rows)) for size in sizes if size >= rows)):
        found = with_entry(found, entry)
    return found


def with_entry(summary: Summary, entry: CurvePoint | LeftOut) -> Summary:
    """The summary with this entry of the curve, in place of one of the same size."""
    curve = summary.learning_curve
    assert curve is not None, "call begin_curve first"
    before: list[CurvePoint | LeftOut] = [*curve.points, *curve.left_out]
    entries = sorted([one for one in before if one.windows != entry.windows] + [entry], key=lambda one: one.windows)
    changed = LearningCurve(
        points=[one for one in entries if isinstance(one, CurvePoint)],
        left_out=[one for one in entries if isinstance(one, LeftOut)],
    )
    return summary.model_copy(update={"learning_curve": changed})


def open_sizes(summary: Summary, sizes: Sequence[int]) -> list[int]:
    """The sizes without a point that can have one; a training that failed in an earlier try is tried again."""
    curve = summary.learning_curve
    done = {point.windows for point in curve.points} if curve else set()
    return [size for size in sizes if size not in done and size < summary.data.rows.train]


@dataclass(frozen=True)
class Parts:
    """Trains on parts of the rows of a run, one after the other; no model is kept.

    `make_learner` takes the rows of a part and the number of its optimizer steps, `load` the adapters and heads of its
    best epochs, of which `average` are wanted. `fitting` are the settings of `take_part`, `dtype` and `engine` those of
    the export.
    """

    data: Dataset
    tokens: TokenStore
    tokenizer: PreTrainedTokenizerBase
    loop: Loop
    make_learner: Callable[[Dataset, int], Learner]
    load: Callable[[Mapping[int, Weights]], Candidates]
    reporter: Reporter
    fitting: Mapping[str, Any]
    average: int
    dtype: ExportDtype
    engine: EngineChoice

    def compute(self, windows: int) -> CurvePoint | LeftOut:
        """Train and score on so many training windows; a `LeftOut` if they cannot be trained on."""
        rows = np.sort(part_order(self.data.labels["train"], self.loop.seed)[:windows])
        try:
            part = take_part(self.data, rows, self.tokens, self.tokenizer, **self.fitting)
            weights = self._train(part)
            release_memory()
            score = self._score(part, weights)
            release_memory()
        except (ConfigError, DataError, TrainingDiverged) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            self.reporter.say(f"note: the learning curve leaves out {windows:,} windows: {reason}")
            return LeftOut(windows=windows, reason=reason)
        mirror = part.training.augmentation.mirror
        baselines, _ = fit_baselines(part.files, part.labels, self._split, part.codec, self.loop.seed, mirror=mirror)
        best = best_on_validation({name: baseline.scores for name, baseline in baselines.items()})
        best_score = float(baselines[best].scores[PRIMARY_METRIC])
        figures = f"macro-F1 {score:.3f}, best baseline ({readable(best)}) {best_score:.3f}"
        self.reporter.say(f"learning curve: {windows:,} windows, {figures}")
        return CurvePoint.model_validate(
            {
                "windows": windows,
                "classes": by_label(class_counts(part.labels["train"])),
                "epoch": next(iter(weights)),
                "macro_f1": score,
                "best_baseline": best,
                "baseline_macro_f1": best_score,
                **leak_mark(self.data.leaked),
            }
        )

    @property
    def _split(self) -> str:
        """The rows that the run is judged on."""
        return "test" if "test" in self.data.files else "val"

    def _train(self, part: Dataset) -> dict[int, Weights]:
        """The weights of the best epochs on the validation rows, by number, the best one first."""
        loop, state, weights = self.loop, TrainState(), dict[int, Weights]()
        steps = steps_per_epoch(int(part.epoch_counts_C.sum()), loop.batch_size, loop.accumulation)
        learner = self.make_learner(part, loop.epochs * steps)
        windows, val, labels_N = len(part.labels["train"]), part.tokens["val"], part.labels["val"]
        while not state.is_finished(loop.epochs, loop.patience):
            number = len(state.epochs) + 1
            with self.reporter.track_part(windows, number, loop.epochs, steps) as after_step:
                for _ in run_steps(learner, part, state, loop, steps, self.reporter.say):
                    after_step()
            metrics = validate(learner, learner.loss_fn, val, labels_N, part.names["val"], lambda _rows: None)
            state.epochs.append({"epoch": number, **metrics})
            best = rank_epochs(state.epochs)[: self.average]
            if number in best:
                weights[number] = trainable_state(learner.model)
            weights = {epoch: weights[epoch] for epoch in best}
        return weights

    def _score(self, part: Dataset, weights: Mapping[int, Weights]) -> float:
        """Macro-F1 of the merged model, in the dtype of the export, as the run chooses and scores its own."""
        candidates, tokenizer, say = self.load(weights), self.tokenizer, self.reporter.say
        trained, _ = choose_weights(candidates, tokenizer, part, dtype=self.dtype, engine=self.engine, say=say)
        return exported_macro_f1(trained, tokenizer, part, self._split, self.dtype, self.engine)
