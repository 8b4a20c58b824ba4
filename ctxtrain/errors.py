"""What can go wrong, by whose fault, and with which exit code the program then ends.

    CtxtrainError
    ├── ConfigError        2    a config key, an override or a command-line argument
    ├── DataError         65    rows, or a model file, that do not hold what they should
    ├── TrainingDiverged  70    a loss or gradient that is not finite
    ├── ExportError       70    the exported model does not answer as the trained one did
    ├── OutOfMemory       70    the system gave no more memory
    ├── RunLocked         75    another process trains in the same run folder
    └── Interrupted  128 + n    signal n arrived; a checkpoint is on disk

`OSError` (disk full, read-only folder) is left as it is and ends with 74. Every message states the rule,
the value found and the remedy. Whatever else escapes is our own fault and ends with 70.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence

EXIT_TARGETS_MISSED = 3
EXIT_INTERNAL = 70
EXIT_IO = 74

MAX_FAULTS_SHOWN = 100


def shown(value: object) -> str:
    """A value that was found, as JSON of at most 60 characters, for a message."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr, skipkeys=True)
    except RecursionError:
        text = "a value nested too deeply to show"
    except ValueError:  # it holds itself, or a number of thousands of digits
        text = "a value that cannot be shown"
    return text if len(text) <= 60 else f"{text[:59]}…"


class CtxtrainError(Exception):
    """Base of the errors a user can act on; `exit_code` is the process's exit code."""

    exit_code = EXIT_INTERNAL


class FaultsError(CtxtrainError):
    """Several faults found in one pass, shown together so that they can be mended together.

    `faults` holds at most the first `MAX_FAULTS_SHOWN`; `total` counts all of them.
    """

    def __init__(self, faults: str | Sequence[str], *, total: int | None = None) -> None:
        self.faults = [faults] if isinstance(faults, str) else list(faults)[:MAX_FAULTS_SHOWN]
        self.total = total if total is not None else (1 if isinstance(faults, str) else len(faults))
        hidden = self.total - len(self.faults)
        lines = self.faults + ([f"… and {hidden:,} more ({self.total:,} in all)"] if hidden else [])
        super().__init__("\n".join(lines))


class ConfigError(FaultsError):
    """A key, value or argument breaks the schema of `config/schema.py` or contradicts the data."""

    exit_code = 2


class DataError(FaultsError):
    """Rows, or a model file, break the format; each fault names its place."""

    exit_code = 65


class TrainingDiverged(CtxtrainError):
    """A loss or gradient was not finite; weights and checkpoints are as they were before the step."""


class ExportError(CtxtrainError):
    """The exported folder, read by plain transformers, does not give the trained model's logits."""


class OutOfMemory(CtxtrainError):
    """The system gave no more memory; says what for, and what would need less."""


class RunLocked(CtxtrainError):
    """Another process owns the run folder."""

    exit_code = 75


class Interrupted(CtxtrainError):
    """A signal asked for the end; whatever was trained is in a checkpoint, and no export was left half done."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
        self.signal_name = signal.Signals(signal_number).name
