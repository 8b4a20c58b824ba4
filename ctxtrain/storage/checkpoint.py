"""Checkpoints: written whole, ranked by validation, read without running code.

    checkpoint_epoch_N.pt   after epoch N; the best `keep` by macro-F1 and the newest stay
    checkpoint_step_S.pt    within an epoch, after optimizer step S; only until a newer checkpoint is on disk

A checkpoint holds tensors, numbers, text, lists and dicts, nothing else. This is the one module that calls torch.load,
and only on bytes whose SHA-256 is the one written with them (the seal of `atomic_files.py`).
"""

from __future__ import annotations

import errno
import hashlib
import io
import math
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt

from ctxtrain.errors import ConfigError, DataError
from ctxtrain.memory import ran_out
from ctxtrain.regular_files import odd_kind, read_regular
from ctxtrain.storage.atomic_files import Damaged, WriteFailed, make_folder, seal, seal_fits, sha256_file, write_bytes
from ctxtrain.storage.validated import Part, refuse_unlike

FORMAT = 1
REMEDY = "No run writes such a checkpoint: move it away, and the resume takes the one before"
ABSENT = "absent"
# What torch's own unpickler lets out when a file was damaged or made by a stranger.
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


class _Epoch(Part):
    model_config = ConfigDict(allow_inf_nan=True)

    epoch: PositiveInt
    macro_f1: float
    loss: float


class _State(Part):
    model_config = ConfigDict(extra="forbid")

    step: NonNegativeInt = 0
    skipped: NonNegativeInt = 0
    loss_sum: float = 0.0
    weight_sum: float = 0.0
    epochs: list[_Epoch] = Field(default_factory=list)
    metrics_sha256: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""


class _Payload(Part):
    """What every checkpoint has; `training/checkpoint_parts.py` knows the rest."""

    model_config = ConfigDict(extra="forbid")

    format: int
    state: _State
    learner: dict[str, Any]
    fingerprint: dict[str, Any]
    environment: dict[str, str | int]


@dataclass
class TrainState:
    """Where a run stands; with the learner's state it is all that resume needs.

    `step` counts the optimizer steps of the run, with the `skipped` ones, and `epochs` holds a record per finished
    epoch; the two sums are loss and class weight of the epoch under way. `metrics_sha256` is of the lines of
    `metrics.jsonl` so far.
    """

    step: int = 0
    skipped: int = 0
    loss_sum: float = 0.0
    weight_sum: float = 0.0
    epochs: list[dict[str, Any]] = field(default_factory=list)
    metrics_sha256: str = ""

    def ended(self, epochs: int, patience: int | None) -> bool:
        """Whether all `epochs` are finished, or the last `patience` of them brought no better macro-F1."""
        scores = [epoch["macro_f1"] for epoch in self.epochs]
        tired = patience is not None and len(scores) > patience and max(scores[:-patience]) >= max(scores[-patience:])
        return len(scores) >= epochs or tired


def ranking(epochs: Sequence[Mapping[str, Any]]) -> list[int]:
    """Epoch numbers, best first: highest macro-F1, then lowest validation loss, then earliest; never a NaN."""
    scored = [entry for entry in epochs if not math.isnan(entry["macro_f1"] + entry["loss"])]
    ordered = sorted(scored, key=lambda entry: (-entry["macro_f1"], entry["loss"], entry["epoch"]))
    return [entry["epoch"] for entry in ordered]


class CheckpointFolder:
    """The checkpoints of one run. It deletes only files that it named itself."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def epoch_path(self, epoch: int) -> Path:
        return self.folder / f"checkpoint_epoch_{epoch}.pt"

    def save_epoch(self, payload: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]]) -> None:
        """Write the checkpoint of the last of `epochs`, then delete what is neither among the best nor the newest.

        Nothing is deleted before the new file has been read back.
        """
        save(self.epoch_path(epochs[-1]["epoch"]), payload)
        kept = self._kept(epochs)
        for path, kind, number in self.files():
            if kind == "step" or number not in kept:
                path.unlink()

    def save_step(self, payload: Mapping[str, Any], step: int) -> None:
        """Write a checkpoint within an epoch; it replaces the one before it."""
        save(self.folder / f"checkpoint_step_{step}.pt", payload)
        for path, kind, number in self.files():
            if kind == "step" and number != step:
                path.unlink()

    def forget_older(self, path: Path, step: int, epochs: Sequence[Mapping[str, Any]]) -> None:
        """Delete what the save of `path`, after optimizer step `step`, would have deleted if it was cut short."""
        kept = self._kept(epochs)
        for other, kind, number in self.files():
            if other != path and (number <= step if kind == "step" else number <= len(epochs) and number not in kept):
                other.unlink()

    def _kept(self, epochs: Sequence[Mapping[str, Any]]) -> set[int]:
        return {*ranking(epochs)[: self.keep], *(epoch["epoch"] for epoch in epochs[-1:])}

    def resume_point(self, steps_per_epoch: int, say: Callable[[str], None]) -> Path | None:
        """The checkpoint furthest in the run that is whole, and so is that of the best epoch before it, for the export.

        Of two at the same step it is the one after evaluation. What is passed over is told to `say`; training from an
        earlier checkpoint makes the same files again. Raises DataError if there are checkpoints and none will do.
        """
        places = {
            path: (number * steps_per_epoch, True) if kind == "epoch" else (number, False)
            for path, kind, number in self.files()
        }
        faults: list[str] = []
        for path in self.odd():
            say(f"note: {path} is passed over, for it is {odd_kind(path)} and no file.")
        for path in sorted(places, key=places.__getitem__, reverse=True):
            try:
                best = ranking(load(path)["state"].get("epochs", []))[:1]
                if best and self.epoch_path(best[0]) != path:
                    load(self.epoch_path(best[0]))
            except FileNotFoundError as error:
                faults.append(f"{path}: of no use without {error.filename}, the best epoch so far.")
            except Damaged as error:
                faults.append(str(error))
            else:
                for fault in faults:
                    say(f"note: {fault} Resuming from {path.name}, which is whole.")
                return path
        if faults:
            raise DataError([*faults, "No checkpoint is left to resume from. Delete them to start from the beginning."])
        say(f"note: {self.folder.parent} has no checkpoint to go on from; the run begins anew")
        return None

    def files(self) -> list[tuple[Path, str, int]]:
        """The checkpoints with their kind, epoch or step, and its number."""
        return [found for found in self._named() if not odd_kind(found[0])]

    def odd(self) -> list[Path]:
        """What has a checkpoint's name and is no file."""
        return [path for path, _, _ in self._named() if odd_kind(path)]

    def _named(self) -> list[tuple[Path, str, int]]:
        matches = [(path, _NAME.fullmatch(path.name)) for path in self.folder.glob("checkpoint_*.pt")]
        return sorted((path, match[1], int(match[2])) for path, match in matches if match)


def save(path: Path, payload: Mapping[str, Any]) -> None:
    """Write and read back. Raises WriteFailed; the file that had the name before is then still there."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **payload}, buffer)
    seal(buffer)
    make_folder(path.parent)
    write_bytes(path, buffer.getbuffer())
    if sha256_file(path) != hashlib.sha256(buffer.getbuffer()).hexdigest():
        raise WriteFailed(errno.EIO, "does not read back as it was written; the disk may be failing", str(path))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Raises Damaged if it is not what was written, DataError if of another format."""
    content = _read_whole(path)
    try:
        if content.read(4) != b"PK\x03\x04":  # torch reads older containers too, by older and slower code
            raise pickle.UnpicklingError("not a zip as torch.save writes it")
        content.seek(0)
        payload = torch.load(content, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        if ran_out(error) and not _is_room_for(2 * len(content.getbuffer())):
            raise  # the file may be sound; one that is not asks for more than its own size
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise Damaged(f"{path}: not a readable checkpoint ({reason}).") from None
    found = payload.get("format") if isinstance(payload, dict) else None
    if type(found) is not int or found != FORMAT:
        got = repr(found) if type(found) is int else type(found).__name__
        raise DataError(
            f"{path}: a checkpoint must be of format {FORMAT}, got {got}. Resume with the version that wrote it."
        )
    refuse_unlike(_Payload, payload, path, REMEDY)
    _check_name(path, {"epochs": [], "step": 0, **payload["state"]})
    return payload  # type: ignore[no-any-return]  # torch.load is untyped


def _is_room_for(size: int) -> bool:
    try:
        return len(bytearray(size)) == size
    except MemoryError:
        return False


def _check_name(path: Path, state: Mapping[str, Any]) -> None:
    """A file that was copied over another is whole, but not what its name says."""
    named = _NAME.fullmatch(path.name)
    if named:
        held = len(state["epochs"]) if named[1] == "epoch" else state["step"]
        if held != int(named[2]):
            raise Damaged(f"{path}: not a readable checkpoint (it holds {named[1]} {held}).")


def _read_whole(path: Path) -> io.BytesIO:
    """The bytes of a checkpoint, if they are those that were written."""
    content = io.BytesIO(read_regular(path))
    if not seal_fits(content):
        raise Damaged(f"{path}: not a readable checkpoint (it lacks the SHA-256 that was written with its bytes).")
    return content


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
        before, after = old.get(key, ABSENT), new.get(key, ABSENT)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before!r} → {after!r}")
    return lines
