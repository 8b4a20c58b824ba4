"""One optimizer step, and the logits of a set of rows, in one process or several.

Input: tokens, labels, and the plan of a step from `batches.py`. Output: updated adapters and head with the figures of
the step; or logits of shape (N, 3). Loss and dropout are independent of world size.

Legend: N rows, B windows of a micro-batch, C = 3 classes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ctxtrain.data.batches import StepPlan, evaluation_batches, plan_step
from ctxtrain.data.tokens import Tokens
from ctxtrain.engine.api import EngineChoice, make_training_engine
from ctxtrain.errors import ConfigError, TrainingDiverged
from ctxtrain.labels import LABELS
from ctxtrain.model.forward import logits
from ctxtrain.model.lora import load_trainable_state, trainable_parameters, trainable_state
from ctxtrain.model.losses import Loss
from ctxtrain.model.optimizer import find_non_finite, largest_magnitude
from ctxtrain.runtime import Purpose, seed_torch

Ints = NDArray[np.int64]

REMEDY = "Check those rows, start again with a lower training.learning_rate, or resume from the last checkpoint"


class NonFiniteStep(Exception):
    """A loss, gradient, weight or moment of a step is not finite; raised before any weight changes.

    `figures` are those of the step. `rows` are the rows that alone give a non-finite loss or gradient. `broken` names
    a weight or moment that is not finite.
    """

    def __init__(self, figures: dict[str, float], rows: list[int], broken: str | None) -> None:
        loss, rate, norm = figures["loss"], figures["learning_rate"], figures["grad_norm"]
        suffix = f", and {broken} is not finite" if broken else ""
        super().__init__(f"loss {loss}, gradient norm {norm}, learning rate {rate:g}{suffix}")
        self.figures = figures
        self.rows = rows
        self.broken = broken

    def describe(self, names: Sequence[str], step_rows: Ints) -> str:
        """The figures and the windows that cause them; `names` are the names of all rows."""
        windows = ", ".join(dict.fromkeys(names[row] for row in self.rows or step_rows.tolist()))
        cause = "the window that causes it" if self.rows else "no single window causes it; windows of the step"
        return f"{self}; {cause}: {windows}"

    def stop_reason(self, skipped: int, allowed: int, *, is_epoch_untrained: bool) -> str | None:
        """Why the run cannot skip the step, with the remedy; None if it can."""
        if self.broken:  # no later step could repair it
            return f"No weight was changed. {REMEDY}."
        if skipped >= allowed:
            rule = f"training.skip_nonfinite={allowed} allows no{' more' if allowed else ''} skipped steps"
            return f"No weight was changed, and {rule}. {REMEDY} with training.skip_nonfinite={skipped + 1}."
        if is_epoch_untrained:
            return f"No step of its epoch was finite, and an epoch needs at least one. {REMEDY}."
        return None


class Learner:
    """A model with its optimizer, schedule and loss, on the devices of an Accelerator.

    `engine` selects the engine, see `engine/api.py`. The engine reports through `say` that it has no disk space.
    `tokens_per_batch` bounds micro-batches and validation batches, see `plan_step`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: PeftModel,
        optimizer: Optimizer,
        schedule: LRScheduler,
        loss_fn: Loss,
        *,
        max_grad_norm: float | None,
        seed: int,
        engine: EngineChoice = "auto",
        tokens_per_batch: int | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.engine = make_training_engine(
            model, accelerator.device, engine=engine, scratch=accelerator.project_dir, say=say
        )
        self.network = accelerator.prepare_model(self.engine.network)
        self.optimizer = optimizer
        self.schedule = schedule
        self.loss_fn = loss_fn
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self.tokens_per_batch = tokens_per_batch
        self.parameters = trainable_parameters(model)

    def plan(self, order: Ints, lengths: Ints, step: int, batch_size: int, accumulation: int) -> StepPlan:
        """The micro-batches of optimizer step `step` of an epoch, and which of them are of this process."""
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        return plan_step(
            order,
            lengths,
            step,
            batch_size=batch_size,
            accumulation=accumulation,
            tokens_per_batch=self.tokens_per_batch,
            rank=rank,
            world_size=world_size,
        )

    def step(
        self,
        tokens: Tokens,
        labels_N: Ints,
        plan: StepPlan,
        position: tuple[int, int],
        before_batch: Callable[[], None] | None = None,
    ) -> dict[str, float]:
        """Run one optimizer step on the windows of a plan; returns loss, learning rate and gradient norm.

        The loss is the weighted mean over all windows of the step, across processes. `position` is the epoch and the
        step within it; dropout is seeded with (seed, position, index of the micro-batch). `before_batch` may raise to
        abandon the step: no weight, moment or learning rate changes before the end. Raises NonFiniteStep.
        """
        if not self.network.training:  # train() visits every module, which costs as much as a matrix product
            self.network.train()
        accelerator = self.accelerator
        weight = self.loss_fn.weight(labels_N[plan.windows])
        loss = torch.zeros((), device=accelerator.device)
        for batch in plan.micro_batches:
            if before_batch:
                before_batch()
            seed_torch(self.seed, Purpose.DROPOUT, *position, batch.index)
            is_last = batch is plan.micro_batches[-1]
            with nullcontext() if is_last else accelerator.no_sync(self.network):
                batch_loss = self._loss_sum(self.network, tokens, labels_N, batch.rows) * batch.is_counted / weight
                accelerator.backward(batch_loss * accelerator.num_processes)  # gradients are averaged over processes
            loss += batch_loss.detach()
        norm = accelerator.clip_grad_norm_(self.parameters.values(), self.max_grad_norm or math.inf)
        checked = [accelerator.reduce(loss, "sum"), norm, largest_magnitude(self.parameters, self.optimizer)]
        # The only value that the host waits for, so that a GPU never idles within a step.
        loss_value, norm_value, largest = torch.stack(checked).tolist()
        rate = float(self.schedule.get_last_lr()[0])
        figures = {"loss": loss_value, "learning_rate": rate, "grad_norm": norm_value}
        if not all(map(math.isfinite, (loss_value, norm_value, largest))):
            broken = None if math.isfinite(largest) else find_non_finite(self.parameters, self.optimizer)
            raise NonFiniteStep(figures, self._non_finite_rows(tokens, labels_N, plan.windows), broken)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return figures

    def skip(self) -> None:
        """Skip a step that raised NonFiniteStep: only the schedule advances; the gradients are already cleared."""
        with warnings.catch_warnings():  # torch warns if a schedule advances before the first step of its optimizer
            warnings.simplefilter("ignore", UserWarning)
            self.schedule.step()

    @torch.no_grad()
    def logits(self, tokens: Tokens, batch_size: int, advance: Callable[[int], None]) -> Tensor:
        """Logits of all rows, of shape (N, 3), in every process. Uses no random numbers and changes no weight.

        `advance` is called with the number of rows after each batch.
        """
        self.network.eval()
        accelerator = self.accelerator
        batches = list(evaluation_batches(tokens.lengths, batch_size, self.tokens_per_batch))
        logits_NC = torch.zeros(len(tokens), len(LABELS), device=accelerator.device)
        for first in range(0, len(batches), accelerator.num_processes):
            # All processes must run the model equally often; a process without a batch repeats the last one.
            index = first + accelerator.process_index
            rows = batches[min(index, len(batches) - 1)]
            logits_BC = self._logits(self.network, tokens, rows)
            if index < len(batches):
                logits_NC[rows] = logits_BC
            advance(sum(len(batch) for batch in batches[first : first + accelerator.num_processes]))
        gathered: Tensor = accelerator.reduce(logits_NC, "sum")  # each row is zero in all processes but one
        return gathered

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer state, schedule, and the weight names: optimizers key their state by position.

        Raises TrainingDiverged if a weight or moment is not finite: a checkpoint must never hold one.
        """
        if broken := find_non_finite(self.parameters, self.optimizer):
            raise TrainingDiverged(
                f"a checkpoint must be finite, but {broken} is not. Checkpoints on disk are unchanged: "
                "start again with a lower training.learning_rate, or resume from the last one."
            )
        return {
            "weights": trainable_state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "optimizer_names": list(self.parameters),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned. Raises ConfigError if the weights differ in name or order."""
        if state["optimizer_names"] != list(self.parameters):
            raise ConfigError(
                "The checkpoint must hold the weights of this config in the same order. Resume with the run's config."
            )
        load_trainable_state(self.model, state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])

    def _loss_sum(self, network: torch.nn.Module, tokens: Tokens, labels_N: Ints, rows: Ints) -> Tensor:
        """Weighted sum of the loss over rows."""
        batch = self.engine.batch(tokens, rows, self.accelerator.device, labels_N)
        labels_B = batch.pop("labels")
        loss_sum, _ = self.loss_fn.sums(logits(network, batch), labels_B)
        return loss_sum

    def _logits(self, network: torch.nn.Module, tokens: Tokens, rows: Ints) -> Tensor:
        """Logits of rows, of shape (B, 3)."""
        return logits(network, self.engine.batch(tokens, rows, self.accelerator.device))

    def _non_finite_rows(self, tokens: Tokens, labels_N: Ints, rows: Ints) -> list[int]:
        """The rows whose loss or gradient is not finite when computed alone."""
        non_finite = []
        for row in sorted(set(rows.tolist())):
            self.optimizer.zero_grad()
            loss_sum = self._loss_sum(self.engine.network, tokens, labels_N, np.array([row]))
            self.accelerator.backward(loss_sum)
            gradients = [weight.grad for weight in self.parameters.values() if weight.grad is not None]
            if not all(bool(torch.isfinite(value).all()) for value in (loss_sum, *gradients)):
                non_finite.append(row)
        self.optimizer.zero_grad()
        return non_finite
