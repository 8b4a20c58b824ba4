"""The optimizer steps of one epoch, for a run and for the parts of its learning curve.

Input: a learner, the rows, and the state of a training, which may lie within an epoch. Output: for each step its
figures, and its record as `metrics.jsonl` has it; learner and state have taken the step when they are yielded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ctxtrain.data.dataset import Dataset
from ctxtrain.data.oversampling import epoch_rows
from ctxtrain.errors import TrainingDiverged
from ctxtrain.storage.checkpoint import TrainState
from ctxtrain.training.step import Ints, Learner, NonFiniteStep

Say = Callable[[str], None]
Record = dict[str, Any]


@dataclass(frozen=True)
class Loop:
    """What a config says about the loop of a training; a step has `batch_size` × `accumulation` windows."""

    epochs: int
    patience: int | None
    seed: int
    batch_size: int
    accumulation: int
    skip_nonfinite: int


def run_steps(
    learner: Learner,
    data: Dataset,
    state: TrainState,
    loop: Loop,
    steps_per_epoch: int,
    say: Say,
    before_batch: Callable[[], None] | None = None,
) -> Iterator[tuple[Record, dict[str, float]]]:
    """Run the steps that remain of the current epoch; yields the record and the figures of each.

    `say` receives a note for each step that is skipped. `before_batch` may raise to abandon a step, see `Learner.step`.
    Raises TrainingDiverged if a step is not finite and no skip is allowed.
    """
    epoch, first = divmod(state.step, steps_per_epoch)
    if first == 0:
        state.loss_sum = state.weight_sum = 0.0
    tokens, labels_R = data.training.tokens(epoch), data.training.labels_R
    order = epoch_rows(labels_R, data.epoch_counts_C, loop.seed, epoch)
    for step in range(first, steps_per_epoch):
        plan = learner.plan(order, tokens.lengths, step, loop.batch_size, loop.accumulation)
        numbers = {"step": state.step + 1, "epoch": epoch + 1}
        try:
            figures = learner.step(tokens, labels_R, plan, (epoch, step), before_batch)
            weight = learner.loss_fn.weight(labels_R[plan.windows])
            state.loss_sum += figures["loss"] * weight
            state.weight_sum += weight
            record = {"kind": "step", **numbers, **figures, "windows": len(plan.windows)}
        except NonFiniteStep as error:
            figures = error.figures
            is_last = numbers["step"] % steps_per_epoch == 0
            record = _skip(learner, data, state, loop, error, numbers, plan.windows, is_last=is_last, say=say)
        state.step += 1
        yield record, figures


def _skip(
    learner: Learner,
    data: Dataset,
    state: TrainState,
    loop: Loop,
    error: NonFiniteStep,
    numbers: dict[str, int],
    windows: Ints,
    *,
    is_last: bool,
    say: Say,
) -> Record:
    """Skip a step, the last of its epoch or not; returns its record. Raises TrainingDiverged if no skip is allowed."""
    names, allowed = data.training.names, loop.skip_nonfinite
    description = f"optimizer step {numbers['step']} has {error.describe(names, windows)}"
    is_epoch_untrained = state.weight_sum == 0 and is_last
    if reason := error.stop_reason(state.skipped, allowed, is_epoch_untrained=is_epoch_untrained):
        raise TrainingDiverged(f"a step needs a finite loss and gradient, but {description}. {reason}") from None
    learner.skip()
    state.skipped += 1
    say(f"note: {description}. Step skipped, {state.skipped} of {allowed} allowed")
    cause = {"why": str(error), "rows": [names[row] for row in error.rows]}
    return {"kind": "skip", **numbers, **cause, "windows": len(windows)}
