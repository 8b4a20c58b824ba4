"""Exceptions and their exit codes.

    CtxtrainError
    ├── ConfigError        2    invalid config key, override or command-line argument
    ├── DataError         65    invalid rows or model file
    ├── TrainingDiverged  70    non-finite loss or gradient
    ├── ExportError       70    the logits of the export differ from those of the trained model
    ├── OutOfMemory       70    a memory allocation failed
    ├── RunLocked         75    another process holds the run folder
    └── Interrupted  128 + n    signal n arrived; a checkpoint is on disk

`OSError` (disk full, read-only folder) is not wrapped; its exit code is 74. Any other exception is a bug in ctxtrain;
its exit code is 70. Every message gives the rule, the value found and the remedy.
"""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Mapping, Sequence

EXIT_TARGETS_MISSED = 3
EXIT_INTERNAL = 70
EXIT_IO = 74

MAX_FAULTS_SHOWN = 100


def short_repr(value: object) -> str:
    """Format a value for an error message: JSON, cut to 60 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr, skipkeys=True)
    except RecursionError:
        text = "a value nested too deeply to show"
    except ValueError:  # a circular reference, or an integer above Python's limit of digits
        text = "a value that cannot be shown"
    return text if len(text) <= 60 else f"{text[:59]}…"


def describe_kinds(counts: Mapping[str, int]) -> str:
    """The three most common kinds of faults with their counts, as the end of a line; empty if none is known."""
    kinds = [f"{count:,} × {kind}" for kind, count in Counter(counts).most_common(3)]
    return f": {'; '.join(kinds)}" if kinds else ""


class CtxtrainError(Exception):
    """Base class of errors that a user can act on; `exit_code` is the exit code of the process."""

    exit_code = EXIT_INTERNAL


class FaultsError(CtxtrainError):
    """Several faults of one pass over the input, reported together so that a user can fix all of them at once.

    `faults` has at most the first `MAX_FAULTS_SHOWN`; `total` counts all of them. `hidden` counts, by kind, those that
    are left out of `faults`, as far as the kind is known.
    """

    def __init__(
        self, faults: str | Sequence[str], *, total: int | None = None, hidden: Mapping[str, int] | None = None
    ) -> None:
        self.faults = [faults] if isinstance(faults, str) else list(faults)[:MAX_FAULTS_SHOWN]
        self.total = total if total is not None else (1 if isinstance(faults, str) else len(faults))
        self.hidden = Counter(hidden)
        more = self.total - len(self.faults)
        tail = [f"… and {more:,} more ({self.total:,} in all){describe_kinds(self.hidden)}"] if more else []
        super().__init__("\n".join(self.faults + tail))


class ConfigError(FaultsError):
    """A key, value or argument violates the schema of `config/schema.py` or contradicts the data."""

    exit_code = 2


class DataError(FaultsError):
    """Rows or a model file violate the format; each fault names its location."""

    exit_code = 65


class TrainingDiverged(CtxtrainError):
    """A loss or gradient was not finite. Weights and checkpoints keep their state from before the step."""


class ExportError(CtxtrainError):
    """The exported folder, opened by transformers, does not reproduce the logits of the trained model."""


class OutOfMemory(CtxtrainError):
    """A memory allocation failed. The message names the operation and what would need less memory."""


class RunLocked(CtxtrainError):
    """Another process holds the lock of the run folder."""

    exit_code = 75


class Interrupted(CtxtrainError):
    """A signal ended the run. A checkpoint holds the training so far, and no partial export is left behind."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
        self.signal_name = signal.Signals(signal_number).name
