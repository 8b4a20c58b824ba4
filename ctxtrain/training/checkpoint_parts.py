"""Check that a checkpoint has the parts that the run's learner saves: keys, types and shapes.

Input: a loaded checkpoint, and the state of a new learner of the same run. Output: nothing, or a DataError that names
each missing, wrong or unexpected part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict

from ctxtrain.errors import ConfigError, DataError
from ctxtrain.model.optimizer import expected_state
from ctxtrain.storage import checkpoint
from ctxtrain.storage.checkpoint import REMEDY, CheckpointFolder, TrainState
from ctxtrain.storage.metrics_log import EpochRecord
from ctxtrain.storage.validated import check_schema
from ctxtrain.training.step import Learner


def load_resume_checkpoint(
    path: Path, folder: CheckpointFolder, fingerprint: Mapping[str, Any], learner: Learner, steps_per_epoch: int
) -> dict[str, Any]:
    """Load a checkpoint to resume from; the checkpoints that the export needs are checked too.

    Raises ConfigError if either belongs to other rows, another base model or other settings, and DataError for wrong
    parts.
    """
    payload = checkpoint.load(path)
    expected = learner.state_dict()
    expected["moments"] = [expected_state(learner.optimizer, weight) for weight in learner.parameters.values()]
    best = [folder.epoch_path(epoch) for epoch in folder.exported_epochs(payload["state"].get("epochs", []))]
    for file in dict.fromkeys([path, *best]):
        content = payload if file == path else checkpoint.load(file)
        checkpoint.check_same_run(file.name, content["fingerprint"], fingerprint)
        check_parts(file, content, expected, steps_per_epoch)
    return payload


def load_exportable(
    path: Path | None, folder: CheckpointFolder, fingerprint: Mapping[str, Any], model: PeftModel, steps_per_epoch: int
) -> TrainState:
    """The state of the newest checkpoint, at `path`. It is checked, and so are those that the export needs.

    `model` may be on the meta device. Optimizer and schedule are not needed and not read. Nor is the dtype of the
    training compared: auto depends on the device, the export does not. Raises ConfigError and DataError as
    `load_resume_checkpoint` does, and ConfigError if no epoch is finished.
    """
    payload = checkpoint.load(path) if path else {"state": {}}
    if path is None or not (epochs := payload["state"].get("epochs", [])):
        rule = "an export needs one finished epoch, this run has none. Continue the run with train --resume."
        raise ConfigError(f"{folder.folder.parent}: {rule}")
    best = [folder.epoch_path(epoch) for epoch in folder.exported_epochs(epochs)]
    expected = {"weights": get_peft_model_state_dict(model, save_embedding_layers=False)}
    for file in dict.fromkeys([path, *best]):
        content = payload if file == path else checkpoint.load(file)
        saved = content["fingerprint"]
        checkpoint.check_same_run(file.name, saved, {**fingerprint, "dtype": saved.get("dtype")})
        reasons = _differences({"weights": content["learner"].get("weights")}, expected, "learner")
        _refuse(file, reasons + _state_faults(file, content["state"], steps_per_epoch))
    return TrainState(**payload["state"])


def check_parts(path: Path, payload: Mapping[str, Any], expected: Mapping[str, Any], steps_per_epoch: int) -> None:
    """Raises DataError if a checkpoint of this run, by its fingerprint, differs from what the run's learner saves.

    `expected` is the state of a new learner, with `moments`: the optimizer state that each weight has once it is
    trained. Every part must have the expected keys, types and shapes, and the optimizer settings must be equal.
    """
    schedule = payload["learner"].get("schedule")
    learner, expected = dict(payload["learner"]), dict(expected)
    moments, optimizer = expected.pop("moments"), learner.get("optimizer")
    reasons = []
    if isinstance(optimizer, dict) and "state" in optimizer:
        reasons = _moment_differences(optimizer["state"], moments)
        learner["optimizer"] = optimizer | {"state": expected["optimizer"]["state"]}
    reasons += _differences(learner, expected, "learner") + _state_faults(path, payload["state"], steps_per_epoch)
    step = payload["state"].get("step", 0)
    if isinstance(schedule, dict) and schedule.get("last_epoch") != step:
        reasons.append(f"learner.schedule.last_epoch must be state.step, {step}, got {schedule.get('last_epoch')!r}")
    _refuse(path, reasons)


def _refuse(path: Path, reasons: Sequence[str]) -> None:
    if reasons:
        raise DataError([f"{path}: {reason}. {REMEDY}." for reason in reasons])


def _state_faults(path: Path, values: Mapping[str, Any], steps_per_epoch: int) -> list[str]:
    """Why the state cannot be that of a run of this length. Raises DataError for a record that is not of an epoch."""
    state, reasons = TrainState(**values), []
    for number, record in enumerate(state.epochs, start=1):
        check_schema(EpochRecord, record, f"{path}: epoch {number}", REMEDY)
    ends = [record["step"] for record in state.epochs]
    if ends != [steps_per_epoch * number for number in range(1, len(ends) + 1)]:
        reasons.append(f"state.epochs must end after each {steps_per_epoch} optimizer steps, got {ends[:10]}")
    first = steps_per_epoch * len(ends)
    if not first <= state.step <= first + steps_per_epoch or state.skipped > state.step:
        reasons.append(f"state.step must be from {first} to {first + steps_per_epoch}, got {state.step}")
    return reasons


def _differences(value: Any, expected: Any, key: str) -> list[str]:
    """How a nested state differs from the expected one in keys, types, shapes and optimizer settings."""
    if isinstance(expected, Mapping) and isinstance(value, Mapping):
        lines = [f"{key} lacks {name}" for name in expected if name not in value]
        lines += [f"{key} has the unexpected key {str(name)[:60]}" for name in value if name not in expected]
        return lines + [
            line
            for name in expected
            if name in value
            for line in _differences(value[name], expected[name], f"{key}.{name}")
        ]
    if isinstance(expected, list | tuple) and type(value) is type(expected) and len(value) == len(expected):
        return [line for n, part in enumerate(expected) for line in _differences(value[n], part, f"{key}.{n}")]
    if isinstance(expected, torch.Tensor) and isinstance(value, torch.Tensor):
        matches = value.shape == expected.shape and value.dtype == expected.dtype and value.layout == expected.layout
    else:
        are_numbers = isinstance(expected, float) and isinstance(value, int | float) and not isinstance(value, bool)
        matches = are_numbers or (
            type(value) is type(expected) and not isinstance(expected, list | tuple | torch.Tensor)
        )
        is_setting = key.startswith("learner.optimizer.param_groups.") and not key.endswith(".lr")
        if matches and is_setting and value != expected:
            return [f"{key} must be {expected!r}, got {value!r}"]
    return [] if matches else [f"{key} must be {_describe(expected)}, got {_describe(value)}"]


def _moment_differences(states: Any, expected: Sequence[Mapping[str, torch.Tensor]]) -> list[str]:
    """How the optimizer's state of trained weights, keyed by position of the weight, differs from the expected one."""
    key = "learner.optimizer.state"
    if not isinstance(states, dict) or not states.keys() <= set(range(len(expected))):
        return [f"{key} must be keyed by position of the {len(expected)} weights, got {_describe(states)}"]
    return [
        line
        for position, state in states.items()
        for line in _differences(state, expected[position], f"{key}.{position}")
    ]


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}" if value is not None else "nothing"
