"""Runs of the program that are started, stopped, killed and compared with one that was left alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ctxtrain.config.schema import Config
from ctxtrain.storage import checkpoint
from ctxtrain.storage.atomic_files import sha256_file
from ctxtrain.storage.run_folder import RunFolder
from tests.conftest import Amount


@dataclass
class Ended:
    """How a run ended: the code (negative: by that signal), what it said, and the phases it went through if asked."""

    code: int
    said: str
    phases: list[str]


class Server:
    """The other end of server.py."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started = 0
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.reliability.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[2],
        )

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()

    def ask(self, **command: Any) -> int:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, *words: str, root: Path, **options: Any) -> Child:
        self.started += 1
        output = self.folder / f"output{self.started}.txt"
        return Child(self, self.ask(start=list(words), output=str(output), root=str(root), **options), output)


@dataclass
class Child:
    server: Server
    pid: int
    output: Path

    def running(self) -> bool:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2][0] != "Z"

    def wait(self) -> Ended:
        code = self.server.ask(wait=self.pid)
        phases = self.output.with_suffix(".phases")
        return Ended(
            code,
            self.output.read_text() if self.output.exists() else "",
            phases.read_text().split() if phases.exists() else [],
        )


@dataclass
class Trial:
    """A run in a folder of its own, with the config of the unbroken one."""

    server: Server
    config: Path
    root: Path

    def train(self, **options: Any) -> Child:
        """Start, or continue where the folder has something to continue."""
        words = ["train", str(self.config), f"output_dir={self.root}", "--resume"]
        return self.server.start(*words, root=self.root, **options)

    def finish(self, **options: Any) -> Ended:
        ended = self.train(**options).wait()
        assert ended.code == 0, ended.said
        return ended

    def gone(self) -> None:
        shutil.rmtree(self.root)


def results(root: Path) -> dict[str, Any]:
    """All that a finished run leaves behind and that must not depend on how often it was stopped."""
    folder = RunFolder(root)
    summary = json.loads(folder.summary.read_bytes())
    kept = {path.name: checkpoint.load(path) for path in sorted((root / "checkpoints").glob("*"))}
    return {
        "files": {path.name: sha256_file(path) for path in (folder.zip, folder.best_model, folder.metrics.path)},
        "temperature": summary["calibration"]["temperature"],
        "best": summary["best"]["epoch"],
        "summary": summary,
        "kept": {name: plain({part: saved[part] for part in ("state", "learner")}) for name, saved in kept.items()},
        "names": sorted(path.name for path in root.iterdir() if path.name != "run.lock"),
    }


def plain(tree: Any) -> Any:
    """A nested state with its tensors as bytes, so that == compares every bit."""
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(value) for value in tree]
    if isinstance(tree, torch.Tensor):
        return (str(tree.dtype), tuple(tree.shape), tree.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return tree


def same(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Assert that two results are equal, part by part, so that a failure names the part."""
    for part, value in theirs.items():
        assert mine[part] == value, part


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server whose children import nothing more: what a whole run brings in is imported before the fork."""
    server = Server(folder)
    try:
        yield server
    finally:
        server.close()


def write_config(config: Config, path: Path) -> Path:
    path.write_text(config.to_yaml())
    return path


SHARDS = 4  # parts of a long fault test, so that workers share it; its sample is one part


def points_of(shard: int, shards: int, events: int, amount: Amount) -> list[int]:
    """Every `shards`-th of the calls 1 to `events`; of these a sample of three, or all under --torture."""
    points = list(range(1 + shard, events + 1, shards))
    return points[:: -(-len(points) // amount(3, len(points)))]
