"""Run `reopen.py`, which opens exports with transformers alone, in a process that is started early.

Input: an export folder and texts. Output: logits. The process imports torch and transformers, which takes seconds,
while this one reads rows and trains; then it waits for requests. It finds modules where this process does, but not in
the current folder or beside a script, where a user's own file may have the name of a library.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock, RLock

import numpy as np
import orjson
from numpy.typing import NDArray

from ctxtrain.errors import ExportError, OutOfMemory
from ctxtrain.memory import REMEDY, mentions_out_of_memory

BATCH_SIZE = 32
SCRIPT = Path(__file__).with_name("reopen.py")
DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
Floats = NDArray[np.float64]


class FreshProcess:
    """At most one running process; a fork of this process does not use the one of its parent."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._users = 0  # blocks of `running`
        self._ends_with_users = False  # the first of them started it
        self._lock = RLock()
        self._request = Lock()

    def start(self) -> subprocess.Popen[bytes]:
        """Start the process, unless it runs already."""
        with self._lock:
            if self._process is None or not self._is_running():
                self.stop()
                self._process, self._owner = _start(), os.getpid()
            return self._process

    @contextmanager
    def running(self) -> Iterator[None]:
        """Start the process for the block; the last of several blocks ends it, unless it ran before the first."""
        with self._lock:
            if not self._users:
                self._ends_with_users = not self._is_running()
            self._users += 1
            self.start()
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users and self._ends_with_users:
                    self.stop()

    def stop(self) -> None:
        """End the process, if it runs."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                with suppress(OSError):
                    stream.close()  # type: ignore[union-attr]  # all three are pipes

    def _is_running(self) -> bool:
        return self._process is not None and self._owner == os.getpid() and self._process.poll() is None

    @contextmanager
    def reopened_logits(
        self, folder: Path, texts: Sequence[str], threads: int, device: str = "cpu"
    ) -> Iterator[Future[Floats]]:
        """Yield a future of the logits, shape (texts, 3), that plain transformers computes from an export folder.

        The future raises OutOfMemory or ExportError. If the block ends by an exception, the process is stopped.
        """
        request = _request(folder.absolute(), texts, threads, device)
        process = self.start()
        with ThreadPoolExecutor(1, "reopening") as pool:
            try:
                yield pool.submit(self._ask_alone, process, request, f"{folder}: transformers cannot open the export")
            except BaseException:
                self.stop()
                raise

    def rehearse(self, device: str) -> None:
        """Let the process use a device. Raises ExportError if it cannot, or if it cannot import its libraries."""
        fault = (
            f"the process that will check the export must import torch and transformers and use the {device}, but ends "
            f'with an error. Nothing was trained. Make this work: {sys.executable} -P -c "import torch, transformers"'
        )
        self._ask_alone(self.start(), _request(Path(), [], 1, device), fault)

    def _ask_alone(self, process: subprocess.Popen[bytes], request: bytes, fault: str) -> Floats:
        with self._request:  # two threads would mix up their answers
            return _ask(process, request, fault)


def _request(folder: Path, texts: Sequence[str], threads: int, device: str) -> bytes:
    values = {"folder": str(folder), "texts": list(texts), "batch_size": BATCH_SIZE}
    return orjson.dumps(values | {"threads": threads, "device": device})


def _start() -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name not in DISTRIBUTED}
    options = ["-P", "-s"] if sys.flags.no_user_site else ["-P"]  # -P: neither the script's folder nor the current one
    return subprocess.Popen(
        [sys.executable, *options, str(SCRIPT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(_module_folders())},
        start_new_session=True,  # so that Ctrl-C reaches this process alone, which then ends the other
    )


def _module_folders() -> list[str]:
    """Where this process finds modules, without the current folder and that of the script that it runs."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    own = {Path.cwd(), *([Path(script).resolve().parent] if script else [])}
    return [path for path in sys.path if path and Path(path).resolve() not in own]


def _ask(process: subprocess.Popen[bytes], request: bytes, fault: str) -> Floats:
    assert process.stdin is not None, "it is a pipe, as the two below"
    assert process.stdout is not None
    assert process.stderr is not None
    with suppress(BrokenPipeError):  # it ended; its exit code has the reason
        process.stdin.write(request + b"\n")
        process.stdin.flush()
    answer = next((line for line in process.stdout if line.startswith(b'{"status"')), None)
    if answer is None:
        status, output = process.wait(), process.stderr.read().decode(errors="replace")
    else:
        status, output = orjson.loads(answer)["status"], orjson.loads(answer)["output"]
    if status == -signal.SIGKILL or (status and mentions_out_of_memory(output)):
        raise OutOfMemory(f"memory ran out while transformers opened the new export. {REMEDY}.")
    if status < 0 and not output.strip():
        name = signal.Signals(-status).name
        raise ExportError(f"the process that opens the new export was ended by {name}. Export again.")
    if status:
        raise ExportError(f"{fault}:\n{output[-2000:]}")
    return np.array(orjson.loads(output.splitlines()[-1]))


fresh_process = FreshProcess()
atexit.register(fresh_process.stop)
