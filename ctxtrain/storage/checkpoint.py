"""Checkpoints: atomic writes, ranking by validation scores, and loading that runs no code.

    checkpoint_epoch_N.pt   after epoch N; the best `keep` by macro-F1 and the newest are kept
    checkpoint_step_S.pt    within an epoch, after optimizer step S; kept until a newer checkpoint is on disk

A checkpoint contains only tensors, numbers, text, lists and dicts. No other module calls torch.load, and this one calls
it only after the checksum (see `atomic_files.py`) has been verified.
"""

from __future__ import annotations

import errno
import hashlib
import io
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt

from ctxtrain.errors import ConfigError, DataError
from ctxtrain.evaluation.best_epoch import rank_epochs
from ctxtrain.memory import is_out_of_memory
from ctxtrain.regular_files import non_regular_kind, read_regular
from ctxtrain.storage.atomic_files import (
    DamagedFile,
    WriteFailed,
    append_checksum,
    make_folder,
    sha256_file,
    verify_checksum,
    write_bytes,
)
from ctxtrain.storage.validated import StoredModel, check_schema

FORMAT = 1
REMEDY = "ctxtrain does not write such a checkpoint. Move it away to resume from the previous one"
ABSENT = "absent"
# Exceptions that torch's weights-only unpickler raises for damaged or malicious files.
_UNREADABLE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
_NAME = re.compile(r"checkpoint_(epoch|step)_([1-9][0-9]{0,17})\.pt")


class _Epoch(StoredModel):
    model_config = ConfigDict(allow_inf_nan=True)

    epoch: PositiveInt
    macro_f1: float
    loss: float


class _State(StoredModel):
    model_config = ConfigDict(extra="forbid")

    step: NonNegativeInt = 0
    skipped: NonNegativeInt = 0
    loss_sum: float = 0.0
    weight_sum: float = 0.0
    epochs: list[_Epoch] = Field(default_factory=list)
    metrics_sha256: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""


class _Payload(StoredModel):
    """The schema of every checkpoint; `training/checkpoint_parts.py` checks the nested parts."""

    model_config = ConfigDict(extra="forbid")

    format: int
    state: _State
    learner: dict[str, Any]
    fingerprint: dict[str, Any]
    environment: dict[str, str | int]


@dataclass
class TrainState:
    """The progress of a run. Together with the learner's state it is all that a resume needs.

    `step` counts the optimizer steps of the run, including the `skipped` ones. `epochs` has one record per finished
    epoch. `loss_sum` and `weight_sum` are the sums of loss and class weight in the current epoch. `metrics_sha256` is
    the digest of the lines of `metrics.jsonl` so far.
    """

    step: int = 0
    skipped: int = 0
    loss_sum: float = 0.0
    weight_sum: float = 0.0
    epochs: list[dict[str, Any]] = field(default_factory=list)
    metrics_sha256: str = ""

    def is_finished(self, epochs: int, patience: int | None) -> bool:
        """Whether all `epochs` are finished, or macro-F1 has not improved in the last `patience` epochs."""
        scores = [epoch["macro_f1"] for epoch in self.epochs]
        if patience is None or len(scores) <= patience:
            return len(scores) >= epochs
        out_of_patience = max(scores[:-patience]) >= max(scores[-patience:])
        return len(scores) >= epochs or out_of_patience


class CheckpointFolder:
    """The checkpoints of one run. Deletes only files with a checkpoint name.

    Of the finished epochs the best `keep` are kept, at least the best `needed`, which an export reads.
    """

    def __init__(self, folder: Path, keep: int, needed: int = 1) -> None:
        self.folder = folder
        self.keep = max(keep, needed)
        self.needed = needed

    def epoch_path(self, epoch: int) -> Path:
        return self.folder / f"checkpoint_epoch_{epoch}.pt"

    def exported_epochs(self, epochs: Sequence[Mapping[str, Any]]) -> list[int]:
        """The epochs whose checkpoints an export reads, best first."""
        return rank_epochs(epochs)[: self.needed]

    def save_epoch(self, payload: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]]) -> None:
        """Write the checkpoint of the last of `epochs`, then delete all but the newest and the best `keep` ones.

        Deletion starts only after the new file has been read back.
        """
        save(self.epoch_path(epochs[-1]["epoch"]), payload)
        kept = self._kept_epochs(epochs)
        for path, kind, number in self.files():
            if kind == "step" or number not in kept:
                path.unlink()

    def save_step(self, payload: Mapping[str, Any], step: int) -> None:
        """Write a checkpoint within an epoch, then delete the previous one."""
        save(self.folder / f"checkpoint_step_{step}.pt", payload)
        for path, kind, number in self.files():
            if kind == "step" and number != step:
                path.unlink()

    def delete_superseded(self, path: Path, step: int, epochs: Sequence[Mapping[str, Any]]) -> None:
        """Delete the checkpoints that the save of `path` at optimizer step `step` replaces.

        They still exist if the process ended between the write and the deletion.
        """
        kept = self._kept_epochs(epochs)
        for other, kind, number in self.files():
            if other != path and (number <= step if kind == "step" else number <= len(epochs) and number not in kept):
                other.unlink()

    def _best_so_far(self) -> str:
        return "the best epoch so far" if self.needed == 1 else f"one of the {self.needed} best epochs so far"

    def _kept_epochs(self, epochs: Sequence[Mapping[str, Any]]) -> set[int]:
        return {*rank_epochs(epochs)[: self.keep], *(epoch["epoch"] for epoch in epochs[-1:])}

    def find_resume_point(self, steps_per_epoch: int, say: Callable[[str], None]) -> Path | None:
        """The latest intact checkpoint for which the checkpoints of the best epochs so far are intact too.

        The export needs these epochs. At the same step, the checkpoint after evaluation wins. Skipped checkpoints are
        reported to `say`; training from an earlier one writes the same files again. Returns None without checkpoints.
        Raises DataError if there are checkpoints and none is usable.
        """
        positions = {
            path: (number * steps_per_epoch, True) if kind == "epoch" else (number, False)
            for path, kind, number in self.files()
        }
        faults: list[str] = []
        for path in self.non_files():
            say(f"note: {path} is skipped: it is {non_regular_kind(path)}, not a file.")
        for path in sorted(positions, key=positions.__getitem__, reverse=True):
            try:
                for epoch in self.exported_epochs(load(path)["state"].get("epochs", [])):
                    if self.epoch_path(epoch) != path:
                        load(self.epoch_path(epoch))
            except FileNotFoundError as error:
                faults.append(f"{path}: not usable without {error.filename}, {self._best_so_far()}.")
            except DamagedFile as error:
                faults.append(str(error))
            else:
                for fault in faults:
                    say(f"note: {fault} Resuming from {path.name}, which is intact.")
                return path
        if faults:
            raise DataError([*faults, "No usable checkpoint to resume from. Delete them to start from the beginning."])
        say(f"note: {self.folder.parent} has no checkpoint to resume from; the run starts from the beginning")
        return None

    def files(self) -> list[tuple[Path, str, int]]:
        """Path, kind ("epoch" or "step") and number of each checkpoint."""
        return [entry for entry in self._entries() if not non_regular_kind(entry[0])]

    def non_files(self) -> list[Path]:
        """Paths with a checkpoint name that are not regular files."""
        return [path for path, _, _ in self._entries() if non_regular_kind(path)]

    def _entries(self) -> list[tuple[Path, str, int]]:
        matches = [(path, _NAME.fullmatch(path.name)) for path in self.folder.glob("checkpoint_*.pt")]
        return sorted((path, match[1], int(match[2])) for path, match in matches if match)


def save(path: Path, payload: Mapping[str, Any]) -> None:
    """Write a checkpoint and read it back. If it raises WriteFailed, an older file of this name is unchanged."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **payload}, buffer)
    append_checksum(buffer)
    make_folder(path.parent)
    write_bytes(path, buffer.getbuffer())
    if sha256_file(path) != hashlib.sha256(buffer.getbuffer()).hexdigest():
        raise WriteFailed(errno.EIO, "the file differs when read back; the disk may be failing", str(path))


def load(path: Path) -> dict[str, Any]:
    """Load a checkpoint to the CPU. Raises DamagedFile if it is not intact, DataError for another format version."""
    content = _read_verified(path)
    try:
        if content.read(4) != b"PK\x03\x04":  # torch would read legacy formats too, with older code
            raise pickle.UnpicklingError("not a zip file of torch.save")
        content.seek(0)
        payload = torch.load(content, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        if is_out_of_memory(error) and not _can_allocate(2 * len(content.getbuffer())):
            raise  # memory is low and the file may be intact; a malicious file fails although memory is available
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise DamagedFile(f"{path}: not a readable checkpoint ({reason}).") from None
    version = payload.get("format") if isinstance(payload, dict) else None
    if type(version) is not int or version != FORMAT:
        got = repr(version) if type(version) is int else type(version).__name__
        raise DataError(
            f"{path}: a checkpoint must be of format {FORMAT}, got {got}. Resume with the version that wrote it."
        )
    check_schema(_Payload, payload, path, REMEDY)
    _check_name(path, {"epochs": [], "step": 0, **payload["state"]})
    return payload  # type: ignore[no-any-return]  # torch.load is untyped


def _can_allocate(size: int) -> bool:
    try:
        return len(bytearray(size)) == size
    except MemoryError:
        return False


def _check_name(path: Path, state: Mapping[str, Any]) -> None:
    """Raise DamagedFile if epoch or step differ from the name, as after a copy over another checkpoint."""
    match = _NAME.fullmatch(path.name)
    if match:
        number = len(state["epochs"]) if match[1] == "epoch" else state["step"]
        if number != int(match[2]):
            raise DamagedFile(f"{path}: not a readable checkpoint (it holds {match[1]} {number}).")


def _read_verified(path: Path) -> io.BytesIO:
    """The bytes of a checkpoint whose checksum matches. Raises DamagedFile."""
    content = io.BytesIO(read_regular(path))
    if not verify_checksum(content):
        raise DamagedFile(f"{path}: not a readable checkpoint (its SHA-256 is missing or differs).")
    return content


def check_same_run(name: str, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise ConfigError with the old and new values if a checkpoint was made with other rows, base or settings."""
    changes = differences(saved, current)
    if changes:
        raise ConfigError(
            [f"{name} was made with other inputs; old → new value: {change}" for change in changes]
            + ["Resume with the original inputs, or start a new run in another output_dir."]
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line `key: old → new` for each leaf in which two nested mappings differ."""
    lines = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key, ABSENT), new.get(key, ABSENT)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before!r} → {after!r}")
    return lines
