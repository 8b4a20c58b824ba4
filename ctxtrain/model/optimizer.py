"""The optimizer and the learning rate over the optimizer steps of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import get_total_norm
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from ctxtrain.errors import ConfigError

Schedule = Literal["warmup_stable_decay", "linear", "cosine", "constant"]


def make_optimizer(parameters: Iterable[Parameter], *, learning_rate: float, weight_decay: float) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019). One implementation, the fused one: others differ in the last bits."""
    return AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)


def state_like(optimizer: Optimizer, weight: Tensor) -> dict[str, Tensor]:
    """Keys, types and shapes of what an optimizer of `make_optimizer` keeps of a weight that it has trained."""
    assert isinstance(optimizer, AdamW)
    return {"step": torch.zeros(()), "exp_avg": weight, "exp_avg_sq": weight}


def not_finite(parameters: Mapping[str, Parameter], optimizer: Optimizer) -> str | None:
    """What of the weights and the optimizer's state of them is not finite, the first of it by name, or None.

    An infinite second moment makes its weight stand still for good, and neither loss nor gradient shows it.
    """
    tensors = {name: weight.detach() for name, weight in parameters.items()}
    for name, weight in parameters.items():
        kept = optimizer.state.get(weight, {}).items()
        tensors |= {f"{key} of {name}": of for key, of in kept if isinstance(of, Tensor) and key != "step"}
    if math.isfinite(get_total_norm(tensors.values(), norm_type=math.inf)):
        return None
    return next(name for name, tensor in tensors.items() if not tensor.isfinite().all())


def make_schedule(optimizer: Optimizer, schedule: Schedule, *, warmup_steps: int, total_steps: int) -> LRScheduler:
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
