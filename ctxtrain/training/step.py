"""One optimizer step, and one pass for logits: the arithmetic of training, in one process or several.

Comes in: token rows, labels, and the plan of a step from `batches.py`. Goes out: changed adapters and head, and the
figures of the step; or logits of shape (N, 3). What is lost or drawn does not depend on the number of processes.

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

from ctxtrain.data.batches import StepPlan, Tokens, evaluation_batches
from ctxtrain.engine.api import Engine, for_training
from ctxtrain.errors import ConfigError, TrainingDiverged
from ctxtrain.labels import LABELS
from ctxtrain.model.lora import load_trainable_state, logits, trainable_parameters, trainable_state
from ctxtrain.model.losses import Loss
from ctxtrain.model.optimizer import not_finite
from ctxtrain.runtime import Purpose, seed_torch

Ints = NDArray[np.int64]

ADVICE = "Check those rows, start again with a lower training.learning_rate, or resume from the last checkpoint"


class NonFinite(Exception):
    """A step's loss, gradient, weight or moment is not finite; raised before any weight changes.

    `figures` are those of the step; `rows` cause it on their own; `broken` names a weight or moment.
    """

    def __init__(self, figures: dict[str, float], rows: list[int], broken: str | None) -> None:
        loss, rate, norm = figures["loss"], figures["learning_rate"], figures["grad_norm"]
        also = f", and {broken} is not finite" if broken else ""
        super().__init__(f"loss {loss}, gradient norm {norm}, learning rate {rate:g}{also}")
        self.figures = figures
        self.rows = rows
        self.broken = broken

    def told(self, names: Sequence[str], group: Ints) -> str:
        """For a user: the figures, and the windows behind them; `names` are those of all rows, `group` the step's."""
        named = ", ".join(dict.fromkeys(names[row] for row in self.rows or group.tolist()))
        whose = "the window that causes it" if self.rows else "no window alone causes it; those of the step"
        return f"{self}; {whose}: {named}"

    def why_end(self, skipped: int, allowed: int, *, epoch_untrained: bool) -> str | None:
        """What keeps a run from leaving the step out, and the remedy; None if it may."""
        if self.broken:  # every later step would have it too
            return f"No weight was changed. {ADVICE}."
        if skipped >= allowed:
            rule = f"training.skip_nonfinite={allowed} lets no{' more' if allowed else ''} step be skipped"
            return f"No weight was changed, and {rule}. {ADVICE} with training.skip_nonfinite={skipped + 1}."
        if epoch_untrained:
            return f"No step of its epoch was finite, and an epoch has to train something. {ADVICE}."
        return None


def refuse_not_finite(logits_NC: Tensor, names: Sequence[str]) -> None:
    """Raises TrainingDiverged, with the first rows by name, if logits of validation rows are not finite."""
    rows = (~torch.isfinite(logits_NC)).any(dim=1).nonzero().flatten().tolist()
    if rows:
        named = ", ".join(names[row] for row in rows[:10])
        raise TrainingDiverged(f"the logits of {len(rows)} validation rows are not finite: {named}. {ADVICE}.")


class Learner:
    """A model with its optimizer, schedule and loss, on the devices of an Accelerator.

    `engine` is that of `engine/api.py`, and `passes` are what it gives; `say` is told if the engine has no disk space.
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
        engine: Engine = "auto",
        say: Callable[[str], None] = print,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.passes = for_training(model, accelerator.device, engine=engine, scratch=accelerator.project_dir, say=say)
        self.network = accelerator.prepare_model(self.passes.network)
        self.optimizer = optimizer
        self.schedule = schedule
        self.loss_fn = loss_fn
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self.parameters = trainable_parameters(model)

    def step(
        self,
        tokens: Tokens,
        labels_N: Ints,
        plan: StepPlan,
        position: tuple[int, int],
        before_batch: Callable[[], None] | None = None,
    ) -> dict[str, float]:
        """Train once on the windows of a plan.

        The loss is one quotient over the whole step, in whatever process its windows are. Dropout is drawn from
        (seed, position, number of the micro-batch). `before_batch` may raise to give the step up: until its end no
        weight, moment or rate has changed. Raises NonFinite.
        """
        if not self.network.training:  # walking through all modules takes as long as a product
            self.network.train()
        accelerator = self.accelerator
        weight = self.loss_fn.weight(labels_N[plan.windows])
        loss = torch.zeros((), device=accelerator.device)
        for batch in plan.micro_batches:
            if before_batch:
                before_batch()
            seed_torch(self.seed, Purpose.DROPOUT, *position, batch.index)
            last = batch is plan.micro_batches[-1]
            with nullcontext() if last else accelerator.no_sync(self.network):
                part = self._loss_sum(self.network, tokens, labels_N, batch.rows) * batch.counts / weight
                accelerator.backward(part * accelerator.num_processes)  # gradients are averaged over processes
            loss += part.detach()
        loss_value = float(accelerator.reduce(loss, "sum"))
        norm = float(accelerator.clip_grad_norm_(self.parameters.values(), self.max_grad_norm or math.inf))
        figures = {"loss": loss_value, "learning_rate": float(self.schedule.get_last_lr()[0]), "grad_norm": norm}
        broken = not_finite(self.parameters, self.optimizer)
        if broken or not math.isfinite(loss_value) or not math.isfinite(norm):
            raise NonFinite(figures, self._culprits(tokens, labels_N, plan.windows), broken)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return figures

    def skip(self) -> None:
        """Go on after a step that raised NonFinite: its gradients are gone, and only the schedule has moved."""
        with warnings.catch_warnings():  # torch warns of a schedule that moves before the first step of its optimizer
            warnings.simplefilter("ignore", UserWarning)
            self.schedule.step()

    @torch.no_grad()
    def logits(self, tokens: Tokens, batch_size: int, advance: Callable[[int], None]) -> Tensor:
        """Logits of all rows, of shape (N, 3), in every process. Draws no random number and changes no weight."""
        self.network.eval()
        accelerator = self.accelerator
        batches = list(evaluation_batches(tokens.lengths, batch_size))
        logits_NC = torch.zeros(len(tokens), len(LABELS), device=accelerator.device)
        for first in range(0, len(batches), accelerator.num_processes):
            # All processes go through the model equally often; one without a batch of its own repeats the last.
            own = first + accelerator.process_index
            rows = batches[min(own, len(batches) - 1)]
            scores_BC = self._scores(self.network, tokens, rows)
            if own < len(batches):
                logits_NC[rows] = scores_BC
            advance(sum(len(batch) for batch in batches[first : first + accelerator.num_processes]))
        gathered: Tensor = accelerator.reduce(logits_NC, "sum")  # a row is zero in all processes but one
        return gathered

    def state_dict(self) -> dict[str, Any]:
        """Weights, moments and schedule; optimizers know weights by position, so their names come along.

        Raises TrainingDiverged if the last step left something that is not finite: no checkpoint may hold it.
        """
        if broken := not_finite(self.parameters, self.optimizer):
            raise TrainingDiverged(
                f"a checkpoint must be finite, but {broken} is not. Those on disk are untouched: "
                "start again with a lower training.learning_rate, or resume from the last one."
            )
        return {
            "weights": trainable_state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "optimizer_names": list(self.parameters),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ConfigError if the state is of other weights."""
        if state["optimizer_names"] != list(self.parameters):
            raise ConfigError(
                "A checkpoint must train the weights of this config in the same order; resume with the run's own."
            )
        load_trainable_state(self.model, state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])

    def _loss_sum(self, network: torch.nn.Module, tokens: Tokens, labels_N: Ints, rows: Ints) -> Tensor:
        """Sum of the loss over rows."""
        labels_B = torch.from_numpy(labels_N[rows]).to(self.accelerator.device)
        loss_sum, _ = self.loss_fn.sums(self._scores(network, tokens, rows), labels_B)
        return loss_sum

    def _scores(self, network: torch.nn.Module, tokens: Tokens, rows: Ints) -> Tensor:
        """Logits of rows, of shape (B, 3)."""
        return logits(network, self.passes.batch(tokens, rows, self.accelerator.device))

    def _culprits(self, tokens: Tokens, labels_N: Ints, rows: Ints) -> list[int]:
        """The rows whose loss or gradient is not finite when each is computed alone."""
        culprits = []
        for row in sorted(set(rows.tolist())):
            self.optimizer.zero_grad()
            loss_sum = self._loss_sum(self.passes.network, tokens, labels_N, np.array([row]))
            self.accelerator.backward(loss_sum)
            gradients = [weight.grad for weight in self.parameters.values() if weight.grad is not None]
            if not all(bool(torch.isfinite(value).all()) for value in (loss_sum, *gradients)):
                culprits.append(row)
        self.optimizer.zero_grad()
        return culprits
