"""The learning rate over the optimizer steps of a run."""

from __future__ import annotations

from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from ctxtrain.errors import ConfigError

Schedule = Literal["warmup_stable_decay", "linear", "cosine", "constant"]


def make_schedule(optimizer: Optimizer, schedule: Schedule, *, warmup_steps: int, total_steps: int) -> LRScheduler:
    """Build the scheduler: linear warm-up, then the schedule.

    `warmup_stable_decay` stays constant through the first half of the run and decays linearly to 0 over the second (the
    specification's Gantt chart).

    Raises ConfigError if the warm-up is longer than half of the run.
    """
    if warmup_steps > total_steps // 2:
        raise ConfigError(
            f"training.warmup_steps must be at most half of the run, {total_steps // 2} of {total_steps} optimizer "
            f"steps, got {warmup_steps}. Set training.warmup_steps={total_steps // 2}, or train for more epochs."
        )
    details: dict[str, int | str] = {}
    if schedule == "warmup_stable_decay":
        details = {"num_decay_steps": total_steps - total_steps // 2, "decay_type": "linear"}
    scheduler: LRScheduler = get_scheduler(
        "constant_with_warmup" if schedule == "constant" else schedule,
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=total_steps,
        scheduler_specific_kwargs=details or None,
    )
    return scheduler
