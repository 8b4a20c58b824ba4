"""The run folder: what lies where, and who may write there."""

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
from ctxtrain.regular_files import NotRegular, read_regular
from ctxtrain.reporting.summary_schema import Summary
from ctxtrain.storage.atomic_files import make_folder, write_bytes
from ctxtrain.storage.checkpoint import CheckpointFolder, TrainState
from ctxtrain.storage.metrics_log import MetricsLog
from ctxtrain.storage.ownership import refuse_foreign
from ctxtrain.storage.validated import reasons

_OWNER = re.compile(r"process ([0-9]+) on (\S+) since \S+")
_WRITTEN = (
    r"checkpoint_(epoch|step)_[0-9]+\.pt|config\.yaml|metrics\.jsonl|training_summary\.json|report\.html|run\.owner"
    r"|tracking\.json|runs\.json"
)
_SCRATCH_FILE = re.compile(rf"\.({_WRITTEN})\.[a-z0-9_]{{8}}\.tmp")  # as tempfile makes names
_SCRATCH_FOLDER = re.compile(r"\.export\.[a-z0-9_]{8}")


class RunFolder:
    """Paths of one run below `output_dir`."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.config = self.root / "config.yaml"
        self.best_model = self.root / "best_model.safetensors"
        self.summary = self.root / "training_summary.json"
        self.report = self.root / "report.html"
        self.tracking = self.root / "tracking.json"  # ids of the run in the trackers
        self.export = self.root / "export"
        self.zip = self.root / "final_model.zip"
        self.metrics = MetricsLog(self.root / "metrics.jsonl")
        self._owner_file = self.root / "run.owner"

    def checkpoints(self, keep: int) -> CheckpointFolder:
        return CheckpointFolder(self.root / "checkpoints", keep)

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the folder for this process; the system gives it free when the process ends, however it ends.

        What is written meanwhile only its owner may read, for it shows rows. Raises RunLocked at once if another
        process holds the folder. Locks are local to a machine: network file systems may not honour them.
        """
        make_folder(self.root.parent)
        with private_files():
            make_folder(self.root)
            lock = FileLock(self.root / "run.lock", timeout=0)
            try:
                lock.acquire()
            except Timeout:
                raise RunLocked(
                    f"{self.root}: a run folder takes one process at a time, and {self._owner()} has it. "
                    "Wait for it, stop it, or use another output_dir."
                ) from None
            try:
                since = datetime.now(UTC).isoformat(timespec="seconds")
                write_bytes(self._owner_file, f"process {os.getpid()} on {socket.gethostname()} since {since}".encode())
                self._sweep()
                yield
            finally:
                with suppress(OSError):
                    self._owner_file.unlink()
                lock.release()

    def _owner(self) -> str:
        """Who holds the lock. The file lags behind it: for a moment it is missing, or of an owner that was killed."""
        for _ in range(100):
            with suppress(FileNotFoundError, NotRegular):
                found = _OWNER.fullmatch(read_regular(self._owner_file).decode(errors="replace"))
                if found and (found[2] != socket.gethostname() or _runs(int(found[1]))):
                    return found[0]
            time.sleep(0.01)
        return "another process"

    def _sweep(self) -> None:
        """Delete what a killed process left under scratch names of this class; only the owner may."""
        places = (".*", "checkpoints/.*")
        for path in [path for place in places for path in self.root.glob(place)]:
            if _SCRATCH_FOLDER.fullmatch(path.name):
                shutil.rmtree(path)
            elif _SCRATCH_FILE.fullmatch(path.name):
                path.unlink()

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder on the same file system, for files that are still being made."""
        with tempfile.TemporaryDirectory(prefix=".export.", dir=self.root, ignore_cleanup_errors=True) as name:
            yield Path(name)

    def read_summary(self) -> Summary:
        """What the run ended with. Raises DataError if the file is not that any more."""
        content = read_regular(self.summary)
        try:
            return Summary.model_validate(orjson.loads(content))
        except orjson.JSONDecodeError as error:
            faults = [f"is not valid JSON: {error}"]
        except ValidationError as error:
            faults = reasons(error)
        raise DataError(
            f"{self.summary}: must be the JSON object that a run ends with, but it {'; '.join(faults)}. "
            f"Run ctxtrain export {self.root}, which writes it again."
        )

    def read_config(self) -> str:
        """The text of the run's config. Raises DataError if it is none, and ConfigError if there is none."""
        try:
            return read_regular(self.config).decode()
        except FileNotFoundError:
            raise ConfigError(
                f"{self.root}: no run folder, it has no config.yaml. Give the output_dir of a run."
            ) from None
        except UnicodeDecodeError as error:
            reason = f"must be UTF-8 text, got {error.reason} at byte {error.start}"
            raise DataError(f"{self.config}: {reason}. Put back the file as the run left it.") from None

    def holds(self) -> list[str]:
        """What lies here under the names of what a run writes."""
        files = (self.config, self.best_model, self.summary, self.report, self.export, self.zip, self.metrics.path)
        found = [path.name for path in files if path.exists()]
        checkpoints = self.checkpoints(0)
        named = sorted([*(path for path, _, _ in checkpoints.files()), *checkpoints.odd()])
        return found + [f"checkpoints/{path.name}" for path in named]

    def begin(
        self,
        config: str,
        state: TrainState,
        found: Path | None,
        checkpoints: CheckpointFolder,
        say: Callable[[str], None],
    ) -> None:
        """The first writes of a run, anew or from the checkpoint `found`: a resume that cannot go on changes nothing.

        Raises DataError if `metrics.jsonl` is not as the run left it.
        """
        lines, notes = self.metrics.behind(step=state.step, epoch=len(state.epochs), sha256=state.metrics_sha256)
        for note in notes:
            say(f"note: {note}")
        write_bytes(self.config, config.encode())
        self.metrics.restart(lines)
        if found:
            checkpoints.forget_older(found, state.step, state.epochs)

    def refuse_other_run(self, *, resume: bool, epochs: int = 0) -> None:
        """Raises ConfigError if the folder holds a run that is not to be resumed, or files of a run's names.

        With `resume` the run's own may be there, and checkpoints of up to so many epochs will be written.
        """
        if resume:
            refuse_foreign(self.root, epochs)
            return
        if self.config.exists():
            raise ConfigError(
                f"output_dir must be new, {self.root} holds a run already. "
                "Continue it with --resume, or use another output_dir."
            )
        if found := self.holds():
            raise ConfigError(
                f"output_dir must hold no file that the run would write over, {self.root} has {', '.join(found)}. "
                "Use another output_dir."
            )


@contextmanager
def private_files() -> Iterator[None]:
    """What the block makes only its owner may read, whatever the umask: a run's files show rows."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # someone else's
        return True
    return True
