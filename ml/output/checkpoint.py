"""Checkpoints: written whole, ranked by validation, read without running code.

    checkpoint_epoch_N.pt   after epoch N; the best `keep` by macro-F1 and the newest stay
    checkpoint_step_S.pt    within an epoch, after optimizer step S; only until a newer checkpoint is on disk

A checkpoint holds tensors, numbers, text, lists and dicts, nothing else. This is the one module that calls torch.load.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ml.errors import ConfigError, DataError
from ml.output.files import write_bytes

FORMAT = 1
_NAME = re.compile(r"checkpoint_(epoch|step)_([1-9][0-9]*)\.pt")


def ranking(epochs: Sequence[Mapping[str, Any]]) -> list[int]:
    """Epoch numbers, best first: highest macro-F1, then lowest validation loss, then earliest."""
    ordered = sorted(epochs, key=lambda entry: (-entry["macro_f1"], entry["loss"], entry["epoch"]))
    return [entry["epoch"] for entry in ordered]


class CheckpointFolder:
    """The checkpoints of one run. It deletes only files that it named itself."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def epoch_path(self, epoch: int) -> Path:
        return self.folder / f"checkpoint_epoch_{epoch}.pt"

    def save_epoch(self, payload: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]]) -> None:
        """Write the checkpoint of the last of `epochs`, then delete what is neither among the best nor the newest."""
        newest = epochs[-1]["epoch"]
        save(self.epoch_path(newest), payload)
        kept = {newest, *ranking(epochs)[: self.keep]}
        for path, kind, number in self._files():
            if kind == "step" or number not in kept:
                path.unlink()

    def save_step(self, payload: Mapping[str, Any], step: int) -> None:
        """Write a checkpoint within an epoch; it replaces the one before it."""
        save(self.folder / f"checkpoint_step_{step}.pt", payload)
        for path, kind, number in self._files():
            if kind == "step" and number != step:
                path.unlink()

    def newest(self, steps_per_epoch: int) -> Path | None:
        """The checkpoint that is furthest in the run; of two at the same step, the one after evaluation."""
        places = {
            path: (number * steps_per_epoch, True) if kind == "epoch" else (number, False)
            for path, kind, number in self._files()
        }
        return max(places, key=places.__getitem__, default=None)

    def _files(self) -> list[tuple[Path, str, int]]:
        matches = [(path, _NAME.fullmatch(path.name)) for path in self.folder.glob("checkpoint_*.pt")]
        return sorted((path, match[1], int(match[2])) for path, match in matches if match)


def save(path: Path, payload: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **payload}, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, buffer.getvalue())


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Raises DataError if it is damaged, foreign or of another format."""
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise DataError(
            f"{path}: not a readable checkpoint ({str(error).splitlines()[0][:200]}). "
            "Delete it to resume from the one before."
        ) from None
    found = payload.get("format") if isinstance(payload, dict) else None
    if found != FORMAT:
        raise DataError(
            f"{path}: a checkpoint must be of format {FORMAT}, got {found!r}. Resume with the version that wrote it."
        )
    return payload  # type: ignore[no-any-return]  # torch.load is untyped


def check_same_run(name: str, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raises ConfigError, old and new value named, if a checkpoint was made with other rows, base or settings."""
    changes = differences(saved, current)
    if changes:
        raise ConfigError(
            [f"{name} was made with other inputs; old → new value: {change}" for change in changes]
            + ["Resume with what the run was started with, or start another run in another output_dir."]
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key: old → new` for every leaf at which two nested mappings differ."""
    lines = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before!r} → {after!r}")
    return lines
