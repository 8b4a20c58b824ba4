"""AdamW and the learning rate over the optimizer steps of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

from torch.nn import Parameter
from torch.nn.utils import get_total_norm
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from ctxtrain.errors import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")
Schedule = Literal["warmup_stable_decay", "linear", "cosine", "constant"]


def make_optimizer(parameters: Iterable[Parameter], *, learning_rate: float, weight_decay: float) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019). One implementation, the fused one: others differ in the last bits."""
    return AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)


def not_finite(parameters: Mapping[str, Parameter], optimizer: AdamW) -> str | None:
    """What of the weights and their moments is not finite, the first of it by name, or None.

    An infinite second moment makes its weight stand still for good, and neither loss nor gradient shows it.
    """
    moments = [optimizer.state.get(weight, {}) for weight in parameters.values()]
    tensors = [weight.detach() for weight in parameters.values()]
    tensors += [of[moment] for of in moments for moment in MOMENTS if moment in of]
    if math.isfinite(get_total_norm(tensors, norm_type=math.inf)):
        return None
    names = list(parameters)
    names += [
        f"{moment} of {name}"
        for name, of in zip(parameters, moments, strict=True)
        for moment in MOMENTS
        if moment in of
    ]
    return next(name for name, tensor in zip(names, tensors, strict=True) if not tensor.isfinite().all())


def make_schedule(optimizer: AdamW, schedule: Schedule, *, warmup_steps: int, total_steps: int) -> LRScheduler:
    """Linear warm-up, then the schedule.

    `warmup_stable_decay` stays constant through the first half of the run and decays linearly to 0 over the second (the
    specification's Gantt chart).

    Raises ConfigError if the warm-up is longer than half of the run.
    """
    if warmup_steps > total_steps // 2:
        raise ConfigError(
            f"training.warmup_steps must be at most half of the run, {total_steps // 2} of {total_steps} optimizer "
            f"steps, got {warmup_steps}. Use at most {total_steps // 2}, or more epochs."
        )
    details: dict[str, int | str] = {}
    if schedule == "warmup_stable_decay":
        details = {"num_decay_steps": total_steps - total_steps // 2, "decay_type": "linear"}
    made: LRScheduler = get_scheduler(
        "constant_with_warmup" if schedule == "constant" else schedule,
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=total_steps,
        scheduler_specific_kwargs=details or None,
    )
    return made
