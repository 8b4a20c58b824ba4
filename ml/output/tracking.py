"""Experiment trackers (TensorBoard, MLflow, Weights & Biases), through Accelerate's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from accelerate import Accelerator

from ml.errors import ConfigError


def installed_trackers(names: Sequence[str]) -> list[str]:
    """The names as they are. Raises ConfigError for those whose package is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"tracking.to must name installed packages, {', '.join(missing)} is not. "
            f"Run pip install {' '.join(missing)}."
        )
    return list(names)


def start_tracking(accelerator: Accelerator, config: Mapping[str, Any]) -> None:
    """Open the trackers and give them the config."""
    accelerator.init_trackers("ctxtrain", config=_flat(config))


def track(accelerator: Accelerator, record: Mapping[str, Any]) -> None:
    """Send the numbers of a step or an epoch, at its optimizer step; does nothing without trackers."""
    kind = record["kind"]
    numbers = {f"{kind}/{name}": value for name, value in _flat(record).items() if isinstance(value, int | float)}
    accelerator.log(numbers, step=record["step"])


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`section.key: value`; trackers know neither nesting nor lists."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str) else str(value)
    return flat
