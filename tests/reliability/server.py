"""A process that imports everything once and then forks: a run of the program starts in milliseconds, to be killed.

    python -m tests.reliability.server        a JSON line in for each command, a JSON line out

`{"start": [words], "output": file, ...}` runs `ctxtrain words` in a child and gives its pid; `{"wait": pid}` gives its
exit code, negative for a signal. The options of a start are the arguments of `child`. The server itself never computes,
so that its children can: torch's threads do not survive a fork.
"""

from __future__ import annotations

import errno
import gc
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ctxtrain.train
import ctxtrain.training.build
from ctxtrain.cli import process
from ctxtrain.data import parse_report, token_store
from ctxtrain.evaluation.calibration import TemperatureScaler
from ctxtrain.export import package, reopen
from ctxtrain.export.fresh_process import BATCH_SIZE, FreshProcess
from ctxtrain.reporting import charts, report
from ctxtrain.storage import checkpoint
from ctxtrain.training.step import Learner
from tests.reliability.calls import Calls

torch.set_num_threads(1)
HANGS_AFTER = 300

# Where a signal can be sent from, besides the calls of calls.py: a function, on entry.
PHASES: dict[str, tuple[Any, str]] = {
    "reading": (parse_report, "parse_row"),
    "tokenising": (token_store, "token_rows"),
    "building": (ctxtrain.training.build, "build_learner"),
    "resuming": (checkpoint, "check_same_run"),
    "training": (Learner, "_loss_sum"),
    "evaluation": (Learner, "logits"),
    "saving": (checkpoint, "append_checksum"),
    "merging": (package, "merge"),
    "calibration": (TemperatureScaler, "fit"),
    "reopening": (FreshProcess, "reopened_logits"),
    "packing": (package, "pack"),
    "placing": (ctxtrain.train, "place_export"),
    "summary": (ctxtrain.train, "make_summary"),
}


def child(
    words: list[str],
    output: str,
    *,
    root: str,
    kill_at: int = 0,
    fail_at: int = 0,
    failure: int = 0,
    signal_at: tuple[int, ...] = (),
    signal_in: tuple[str, int] | None = None,
    number: int = 0,
    ledger: str | None = None,
    trace: str | None = None,
    modules: str | None = None,
    wait_for: str | None = None,
    call: str | None = None,
    group: bool = False,
    output_is: str | None = None,
) -> int:
    """Run the program on `root` and give its exit code.

    At the event `kill_at` of calls.py the process kills itself; `fail_at` fails with the errno `failure`; at each of
    `signal_at`, or on the n-th entry of a phase (`signal_in`), it sends itself the signal `number`. `ledger` receives
    the windows of each step, `trace` the events, `modules` the names of what was imported. `wait_for` is a file to wait
    for first. With `call` ("module:function") that function takes the words instead. `group` sends the signal to the
    process group. `output_is` "broken" gives a standard output that nobody reads, "closed" none.
    """
    descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w")
    if output_is == "broken":
        reading, writing = os.pipe()
        os.dup2(writing, 1)
        os.close(reading)
    if output_is == "closed":
        os.close(1)
        sys.stdout = None  # as Python starts without one
    signal.alarm(HANGS_AFTER)
    loaded = set(sys.modules)
    FreshProcess.start = lambda _self: None  # type: ignore[assignment,method-assign,return-value]
    FreshProcess.rehearse = lambda _self, _device: None  # type: ignore[assignment,method-assign]
    FreshProcess.reopened_logits = forked_logits  # type: ignore[assignment,method-assign]
    events: list[tuple[str, str]] = []

    def on_event(count: int, kind: str, path: str) -> None:
        events.append((kind, os.path.relpath(path, root)))
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if count in signal_at:
            os.kill(os.getpid(), number)
        if count == fail_at:
            raise OSError(failure, os.strerror(failure), *([] if kind in ("write", "half", "fsync") else [path]))

    if signal_in:
        send_in(*signal_in, number, group, Path(output).with_suffix(".phases"))
    if ledger:
        keep_ledger(ledger)
    while wait_for and not Path(wait_for).exists():
        pass
    with Calls(Path(root), on_event).installed() if kill_at or fail_at or signal_at or trace else ExitStack():
        code = called(call, words) if call else ended(words)
    if trace:
        Path(trace).write_text(json.dumps(events))
    if modules:
        Path(modules).write_text(json.dumps(sorted(set(sys.modules) - loaded)))
    return code


def called(name: str, words: list[str]) -> int:
    module, _, function = name.partition(":")
    try:
        getattr(importlib.import_module(module), function)(*words)
    except Exception:  # noqa: BLE001
        traceback.print_exc()
        return 1
    return 0


def ended(words: list[str]) -> int:
    try:
        process.main(words)
    except SystemExit as ending:
        return int(ending.code or 0)
    return 0


def send_in(phase: str, entry: int, number: int, group: bool, entered: Path) -> None:
    """Send this process a signal on the n-th entry of a phase; `entered` gets the phases in their order."""
    entries = 0

    def announced(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def enter(*args: Any, **kwargs: Any) -> Any:
            nonlocal entries
            with entered.open("a") as stream:
                stream.write(f"{name}\n")
            entries += name == phase
            if name == phase and entries == entry:
                (os.killpg if group else os.kill)(os.getpid(), number)
            return function(*args, **kwargs)

        return enter

    for name, (owner, attribute) in PHASES.items():
        setattr(owner, attribute, announced(name, getattr(owner, attribute)))


def keep_ledger(path: str) -> None:
    """Append a line with the epoch, the step in it and the windows of every step that changed weights."""
    step: Callable[..., dict[str, float]] = Learner.step

    def counted(self: Learner, tokens: Any, labels_N: Any, plan: Any, *args: Any) -> dict[str, float]:
        figures = step(self, tokens, labels_N, plan, *args)
        position = args[0]
        with open(path, "a") as stream:  # noqa: PTH123
            stream.write(json.dumps([*position, *plan.windows.tolist()]) + "\n")
        return figures

    Learner.step = counted  # type: ignore[method-assign,assignment]


@contextmanager
def forked_logits(_self: FreshProcess, folder: Path, texts: Any, threads: int, device: str) -> Iterator[Any]:
    """What `FreshProcess.reopened_logits` does, in a fork of this process: a fresh one takes seconds to import."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        with suppress(BaseException):
            request = {"folder": str(folder), "texts": list(texts), "batch_size": BATCH_SIZE}
            os.write(writing, reopen.compute(request | {"threads": threads, "device": device}).encode())
            code = 0
        os._exit(code)
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as stream:
            content = stream.read()
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        os.waitpid(pid, 0)
    if not content:  # an injected fault of a system call hits the fork, too
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    future = Future[Any]()
    future.set_result(np.array(json.loads(content)))
    yield future


def warm(modules: list[str]) -> None:
    """Do once what every child would do again: imports, the report's script, and walks of the garbage collector."""
    for name in modules:
        with suppress(Exception):
            importlib.import_module(name)
    charts.script(report._text("report.js"))
    gc.collect()
    gc.freeze()  # children then neither walk through all this nor copy its pages


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        command = json.loads(line)
        if "start" in command:
            pid = os.fork()
            if not pid:
                code = 70
                try:
                    os.setsid()
                    code = child(command.pop("start"), command.pop("output"), **command)
                    for stream in filter(None, (sys.stdout, sys.stderr)):
                        stream.flush()
                finally:
                    os._exit(code)
            answer = pid
        elif "import" in command:
            warm(command["import"])
            answer = 0
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(command["wait"], 0)[1])
        answers.write(f"{answer}\n")
        answers.flush()


if __name__ == "__main__":
    main()
