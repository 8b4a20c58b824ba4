"""Whether the parts of a checkpoint are those that a run's learner saves: keys, types, shapes.

Comes in: a checkpoint that was read, and the state of a new learner of the same run. Goes out: nothing, or a DataError
that names each part that is missing, wrong or too many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ctxtrain.errors import DataError
from ctxtrain.model.optimizer import state_like
from ctxtrain.storage import checkpoint
from ctxtrain.storage.checkpoint import REMEDY, CheckpointFolder, TrainState
from ctxtrain.storage.metrics_log import EpochRecord
from ctxtrain.storage.validated import refuse_unlike
from ctxtrain.training.step import Learner


def load_own(
    path: Path, folder: CheckpointFolder, fingerprint: Mapping[str, Any], learner: Learner, steps_per_epoch: int
) -> dict[str, Any]:
    """A checkpoint to go on from, if it and that of the best epoch before it, for the export, are of this very run.

    Raises ConfigError if rows, base or settings are not those it was made with, DataError for its parts.
    """
    payload, own = (
        checkpoint.load(path),
        learner.state_dict()
        | {"moments": [state_like(learner.optimizer, weight) for weight in learner.parameters.values()]},
    )
    best = checkpoint.ranking(payload["state"].get("epochs", []))[:1]
    for one in [path, *(folder.epoch_path(epoch) for epoch in best if folder.epoch_path(epoch) != path)]:
        found = payload if one == path else checkpoint.load(one)
        checkpoint.check_same_run(one.name, found["fingerprint"], fingerprint)
        refuse_other_parts(one, found, own, steps_per_epoch)
    return payload


def refuse_other_parts(path: Path, payload: Mapping[str, Any], own: Mapping[str, Any], steps_per_epoch: int) -> None:
    """Raises DataError if a checkpoint of this very run, by its fingerprint, has parts that the run's learner lacks.

    `own` is the learner's state as it starts, with `moments`, what its optimizer keeps of each weight once it is
    trained; every part must have its keys, types and shapes, and the settings of the optimizer must be its own.
    """
    state, schedule = TrainState(**payload["state"]), payload["learner"].get("schedule")
    for number, record in enumerate(state.epochs, start=1):
        refuse_unlike(EpochRecord, record, f"{path}: epoch {number}", REMEDY)
    found, own = dict(payload["learner"]), dict(own)
    moments, optimizer = own.pop("moments"), found.get("optimizer")
    reasons = []
    if isinstance(optimizer, dict) and "state" in optimizer:
        reasons = _unlike_moments(optimizer["state"], moments)
        found["optimizer"] = optimizer | {"state": own["optimizer"]["state"]}
    reasons += _unlike(found, own, "learner")
    ends = [record["step"] for record in state.epochs]
    if ends != [steps_per_epoch * number for number in range(1, len(ends) + 1)]:
        reasons.append(f"state.epochs must end after each {steps_per_epoch} optimizer steps, got {ends[:10]}")
    least = steps_per_epoch * len(ends)
    if not least <= state.step <= least + steps_per_epoch or state.skipped > state.step:
        reasons.append(f"state.step must be from {least} to {least + steps_per_epoch}, got {state.step}")
    if isinstance(schedule, dict) and schedule.get("last_epoch") != state.step:
        reasons.append(
            f"learner.schedule.last_epoch must be state.step, {state.step}, got {schedule.get('last_epoch')!r}"
        )
    if reasons:
        raise DataError([f"{path}: {reason}. {REMEDY}." for reason in reasons])


def _unlike(found: Any, own: Any, key: str) -> list[str]:
    """How a nested state differs from the learner's own in keys, types and shapes; values may differ."""
    if isinstance(own, Mapping) and isinstance(found, Mapping):
        lines = [f"{key} lacks {name}" for name in own if name not in found]
        lines += [f"{key} has {str(name)[:60]}, which no run writes" for name in found if name not in own]
        return lines + [
            line for name in own if name in found for line in _unlike(found[name], own[name], f"{key}.{name}")
        ]
    if isinstance(own, list | tuple) and type(found) is type(own) and len(found) == len(own):
        return [line for n, part in enumerate(own) for line in _unlike(found[n], part, f"{key}.{n}")]
    if isinstance(own, torch.Tensor) and isinstance(found, torch.Tensor):
        same = found.shape == own.shape and found.dtype == own.dtype and found.layout == own.layout
    else:
        numbers = isinstance(own, float) and isinstance(found, int | float) and not isinstance(found, bool)
        same = numbers or (type(found) is type(own) and not isinstance(own, list | tuple | torch.Tensor))
        if same and key.startswith("learner.optimizer.param_groups.") and not key.endswith(".lr") and found != own:
            return [f"{key} must be {own!r}, got {found!r}"]
    return [] if same else [f"{key} must be {_described(own)}, got {_described(found)}"]


def _unlike_moments(found: Any, own: Sequence[Mapping[str, torch.Tensor]]) -> list[str]:
    """The optimizer's state of each weight that has been trained, by position of the weight."""
    key = "learner.optimizer.state"
    if not isinstance(found, dict) or not found.keys() <= set(range(len(own))):
        return [f"{key} must be by position of the {len(own)} weights, got {_described(found)}"]
    return [line for place, moments in found.items() for line in _unlike(moments, own[place], f"{key}.{place}")]


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}" if value is not None else "nothing"
