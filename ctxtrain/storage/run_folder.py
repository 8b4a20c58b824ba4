"""The run folder: its layout and its lock."""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import orjson
from filelock import FileLock, Timeout
from pydantic import ValidationError

from ctxtrain.errors import ConfigError, DataError, RunLocked
from ctxtrain.regular_files import NotRegularFile, read_regular
from ctxtrain.reporting.summary_schema import Summary
from ctxtrain.storage.atomic_files import make_folder, write_bytes
from ctxtrain.storage.checkpoint import CheckpointFolder, TrainState
from ctxtrain.storage.metrics_log import MetricsLog
from ctxtrain.storage.ownership import refuse_foreign_files
from ctxtrain.storage.validated import validation_faults

_LOCK_OWNER = re.compile(r"process ([0-9]+) on (\S+) since \S+")
_RUN_FILE = (
    r"checkpoint_(epoch|step)_[0-9]+\.pt|config\.yaml|metrics\.jsonl|training_summary\.json|report\.html|run\.owner"
    r"|tracking\.json|runs\.json"
)
_SCRATCH_FILE = re.compile(rf"\.({_RUN_FILE})\.[a-z0-9_]{{8}}\.tmp")  # as `scratch_path` names them
_SCRATCH_FOLDER = re.compile(r"\.export\.[a-z0-9_]{8}")


class RunFolder:
    """The paths of one run in `output_dir`."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.config = self.root / "config.yaml"
        self.best_model = self.root / "best_model.safetensors"
        self.summary = self.root / "training_summary.json"
        self.report = self.root / "report.html"
        self.tracking = self.root / "tracking.json"  # IDs of the run in the experiment trackers
        self.export = self.root / "export"
        self.zip = self.root / "final_model.zip"
        self.metrics = MetricsLog(self.root / "metrics.jsonl")
        self._owner_file = self.root / "run.owner"

    def checkpoints(self, keep: int, needed: int = 1) -> CheckpointFolder:
        return CheckpointFolder(self.root / "checkpoints", keep, needed)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder for this process. The operating system releases the lock when the process ends or is killed.

        Files created in the block are readable only by their owner, because they contain input rows. Raises RunLocked
        at once if another process holds the lock. Locks are local to a machine: network file systems may ignore them.
        """
        make_folder(self.root.parent)
        with private_files():
            make_folder(self.root)
            lock = FileLock(self.root / "run.lock", timeout=0)
            try:
                lock.acquire()
            except Timeout:
                raise RunLocked(
                    f"{self.root}: the run folder is in use by {self._lock_owner()}. "
                    "Wait for it, stop it, or use another output_dir."
                ) from None
            try:
                since = datetime.now(UTC).isoformat(timespec="seconds")
                write_bytes(self._owner_file, f"process {os.getpid()} on {socket.gethostname()} since {since}".encode())
                self._delete_leftovers()
                yield
            finally:
                with suppress(OSError):
                    self._owner_file.unlink()
                lock.release()

    def _lock_owner(self) -> str:
        """Describe the process that holds the lock.

        The owner file is written after the lock is taken. Until then it is missing, or names a process that was killed.
        """
        for _ in range(100):
            with suppress(FileNotFoundError, NotRegularFile):
                owner = _LOCK_OWNER.fullmatch(read_regular(self._owner_file).decode(errors="replace"))
                if owner and (owner[2] != socket.gethostname() or _is_running(int(owner[1]))):
                    return owner[0]
            time.sleep(0.01)
        return "another process"

    def _delete_leftovers(self) -> None:
        """Delete scratch files and folders of a killed process. The caller must hold the lock."""
        patterns = (".*", "checkpoints/.*")
        for path in [path for pattern in patterns for path in self.root.glob(pattern)]:
            if _SCRATCH_FOLDER.fullmatch(path.name):
                shutil.rmtree(path)
            elif _SCRATCH_FILE.fullmatch(path.name):
                path.unlink()

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A temporary folder on the same file system, so that finished files can be renamed into the run folder."""
        with tempfile.TemporaryDirectory(prefix=".export.", dir=self.root, ignore_cleanup_errors=True) as name:
            yield Path(name)

    def read_summary(self) -> Summary:
        """Read `training_summary.json`. Raises DataError if the file does not match its schema."""
        content = read_regular(self.summary)
        try:
            return Summary.model_validate(orjson.loads(content))
        except orjson.JSONDecodeError as error:
            faults = [f"is not valid JSON: {error}"]
        except ValidationError as error:
            faults = validation_faults(error)
        raise DataError(
            f"{self.summary}: must be the summary of a finished run, but it {'; '.join(faults)}. "
            f"Run ctxtrain export {self.root} to write it again."
        )

    def read_config(self) -> str:
        """Read the text of the run's config. Raises DataError if it is not UTF-8, ConfigError if it is missing."""
        try:
            return read_regular(self.config).decode()
        except FileNotFoundError:
            raise ConfigError(
                f"{self.root}: no run folder, it has no config.yaml. Give the output_dir of a run."
            ) from None
        except UnicodeDecodeError as error:
            reason = f"must be UTF-8 text, got {error.reason} at byte {error.start}"
            raise DataError(f"{self.config}: {reason}. Restore the file as the run left it.") from None

    def existing_outputs(self) -> list[str]:
        """Names of files and folders here that a run would write."""
        files = (self.config, self.best_model, self.summary, self.report, self.export, self.zip, self.metrics.path)
        names = [path.name for path in files if path.exists()]
        folder = self.checkpoints(0)
        checkpoints = sorted([*(path for path, _, _ in folder.files()), *folder.non_files()])
        return names + [f"checkpoints/{path.name}" for path in checkpoints]

    def begin_run(
        self,
        config: str,
        state: TrainState,
        resumed_from: Path | None,
        checkpoints: CheckpointFolder,
        say: Callable[[str], None],
    ) -> None:
        """Write the config and prepare `metrics.jsonl`, for a new run or a resume from a checkpoint.

        Raises DataError before any change if `metrics.jsonl` is not as the run left it.
        """
        lines, notes = self.metrics.lines_up_to(step=state.step, epoch=len(state.epochs), sha256=state.metrics_sha256)
        for note in notes:
            say(f"note: {note}")
        write_bytes(self.config, config.encode())
        self.metrics.replace_lines(lines)
        if resumed_from:
            checkpoints.delete_superseded(resumed_from, state.step, state.epochs)

    def refuse_other_run(self, *, resume: bool, epochs: int = 0) -> None:
        """Raise ConfigError if the folder has a run that is not resumed, or files that the run would overwrite.

        With `resume`, files of the run itself are allowed; `epochs` is the number of epochs with a checkpoint.
        """
        if resume:
            refuse_foreign_files(self.root, epochs)
            return
        if self.config.exists():
            raise ConfigError(
                f"output_dir must be new, {self.root} holds a run already. "
                "Continue it with --resume, or use another output_dir."
            )
        if names := self.existing_outputs():
            raise ConfigError(
                f"output_dir must have no file that the run would overwrite, {self.root} has {', '.join(names)}. "
                "Use another output_dir."
            )


@contextmanager
def private_files() -> Iterator[None]:
    """Make files created in the block readable only by their owner, because files of a run contain input rows."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # a process of another user
        return True
    return True
