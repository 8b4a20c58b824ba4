"""Processes that want one folder at the same moment, or read while another writes; run in children of the server."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from ctxtrain.errors import RunLocked
from ctxtrain.storage import checkpoint
from ctxtrain.storage.archive import pack, unpack
from ctxtrain.storage.atomic_files import check_manifest
from ctxtrain.storage.checkpoint import CheckpointFolder
from ctxtrain.storage.run_folder import RunFolder

WON, LOST, WRONG = 0, 1, 2
PER_EPOCH = 5


def fork(work: Callable[[], int]) -> int:
    pid = os.fork()
    if not pid:
        code = WRONG
        try:
            code = work()
        finally:
            os._exit(code)
    return pid


def races(root: str, rounds: str) -> None:
    """Four processes take a folder at one moment; the winner holds it until it is killed, and then the next may."""
    for number in range(int(rounds)):
        folder = RunFolder(Path(root) / str(number % 2))  # the round before last left the name of a dead owner
        start = time.monotonic() + 0.15  # a fork of this large process takes some milliseconds
        reading, writing = os.pipe()
        pids = [fork(partial(contend, folder, start, writing)) for _ in range(4)]
        winner = int(os.read(reading, 20))
        losers = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids if pid != winner]
        assert losers == [LOST] * 3, losers
        assert winner in pids
        named = [(folder.root / f"loser{pid}").read_text() for pid in pids if pid != winner]
        assert named == [str(winner)] * 3, (named, winner)
        os.kill(winner, signal.SIGKILL)
        assert os.waitpid(winner, 0)[1] == signal.SIGKILL
        os.close(reading)
        os.close(writing)
        with folder.lock():
            assert str(os.getpid()) in (folder.root / "run.owner").read_text()
        fork_and_die(folder)


def contend(folder: RunFolder, start: float, writing: int) -> int:
    while time.monotonic() < start:
        pass
    try:
        with folder.lock():
            os.write(writing, str(os.getpid()).encode())
            signal.pause()
            return WRONG
    except RunLocked as error:
        named = re.search(r"in use by process ([0-9]+) on \S+ since \S+\. Wait", str(error))
        (folder.root / f"loser{os.getpid()}").write_text(named[1] if named else str(error))
        return LOST


def fork_and_die(folder: RunFolder) -> None:
    """Leave the name of an owner that is no more."""

    def work() -> int:
        with folder.lock():
            os.kill(os.getpid(), signal.SIGKILL)
        return WRONG

    os.waitpid(fork(work), 0)


def reads(export: str, root: str, count: str) -> None:
    """Read checkpoints and zip again and again while another process writes and rotates them."""
    run = RunFolder(root)
    (run.root / "checkpoints").mkdir(parents=True)
    folder = CheckpointFolder(run.root / "checkpoints", 2)

    def write() -> int:
        epochs: list[dict[str, float]] = []
        for step in range(1, 1_000_000):
            state = {"step": step, "epochs": epochs}
            weights = {"weights": {"head": torch.full((5000,), float(step))}}
            saved = {"state": state, "learner": weights, "fingerprint": {}, "environment": {}}
            if step % PER_EPOCH:
                folder.save_step(saved, step)
            else:
                epochs.append({"epoch": len(epochs) + 1, "macro_f1": (step * 7919 % 1000) / 1000, "loss": 0.5})
                folder.save_epoch(saved, epochs)
                pack(Path(export), run.zip)
        return WON

    writer, newest, changes, number = fork(write), 0, 0, 0
    try:
        while not run.zip.exists():
            time.sleep(0.01)
        while number < int(count) or changes < int(count) / 10:  # where writing is slow, many reads find nothing new
            assert not os.waitid(os.P_PID, writer, os.WEXITED | os.WNOHANG | os.WNOWAIT), "the writer has died"
            step, behind = -1, 0
            while step < newest:
                # What was newest when the folder was listed may be replaced before it is opened, and a listing may miss
                # a name that appears while it is made (POSIX, readdir); it cannot miss the same one again.
                path = folder.find_resume_point(PER_EPOCH, complain)
                assert path
                with suppress(FileNotFoundError):
                    found = checkpoint.load(path)
                    step = found["state"]["step"]
                    assert (found["learner"]["weights"]["head"] == step).all()
                    behind += step < newest
                    assert behind < 3
            changes, newest = changes + (step > newest), step
            if number % 10 == 0:
                target = run.root / f"unpacked{number}"
                unpack(run.zip, target)
                check_manifest(target)
                shutil.rmtree(target)
            number += 1
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)


def complain(note: str) -> None:
    assert "not usable without" in note, note  # a file that was there when the folder was listed
