"""The run folder: what lies where, and who may write there."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from ml.errors import ConfigError, RunLocked
from ml.output.checkpoint import CheckpointFolder
from ml.output.metrics_log import MetricsLog


class RunFolder:
    """Paths of one run below `output_dir`."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.config = self.root / "config.yaml"
        self.best_model = self.root / "best_model.safetensors"
        self.summary = self.root / "training_summary.json"
        self.report = self.root / "report.html"
        self.export = self.root / "export"
        self.zip = self.root / "final_model.zip"
        self.metrics = MetricsLog(self.root / "metrics.jsonl")

    def checkpoints(self, keep: int) -> CheckpointFolder:
        return CheckpointFolder(self.root / "checkpoints", keep)

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the folder for this process; the system gives it free when the process ends, however it ends.

        Raises RunLocked at once if another process holds it. Locks are local to a machine: network file systems may not
        honour them.
        """
        (self.root / "checkpoints").mkdir(parents=True, exist_ok=True)
        owner = self.root / "run.owner"
        lock = FileLock(self.root / "run.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            who = owner.read_text() if owner.exists() else "another process"
            raise RunLocked(
                f"{self.root}: a run folder takes one process at a time, and {who} has it. "
                "Wait for it, stop it, or use another output_dir."
            ) from None
        try:
            since = datetime.now(UTC).isoformat(timespec="seconds")
            owner.write_text(f"process {os.getpid()} on {socket.gethostname()} since {since}")
            yield
            owner.unlink(missing_ok=True)
        finally:
            lock.release()

    def refuse_other_run(self, *, resume: bool) -> None:
        """Raises ConfigError if the folder holds a run that is not to be resumed."""
        if self.config.exists() and not resume:
            raise ConfigError(
                f"output_dir must be new, {self.root} holds a run already. "
                "Continue it with --resume, or use another output_dir."
            )
