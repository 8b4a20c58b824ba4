"""Device, processes, seeds and signals: the ground that a run stands on.

Randomness is stateless: whatever needs random numbers seeds its own generator from (seed, purpose, epoch, step, …),
so that nothing depends on what ran before and no generator state has to be saved.
"""

from __future__ import annotations

import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from enum import IntEnum
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np

from ctxtrain.errors import Interrupted

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last is what batch systems send before the end


class Purpose(IntEnum):
    """What a stream of random numbers is for; no two purposes share one."""

    HEAD = 1
    SAMPLING = 2
    DROPOUT = 3


def generator(seed: int, purpose: Purpose, *position: int) -> np.random.Generator:
    """A numpy generator that depends on its arguments alone."""
    return np.random.default_rng(np.random.SeedSequence([seed, purpose, *position]))


def seed_torch(seed: int, purpose: Purpose, *position: int) -> None:
    """Put torch's global generators into a state that depends on the arguments alone."""
    import torch

    words = np.random.SeedSequence([seed, purpose, *position]).generate_state(1, np.uint64)
    number = int(words[0]) & (2**63 - 1)
    torch.default_generator.manual_seed(number)  # torch.manual_seed looks for every kind of device, at each call
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(number)


def is_main_process() -> bool:
    """Whether this process writes: the only one, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def make_accelerator(dtype: str) -> Accelerator:
    """The process group, device and precision of a training run.

    Under torchrun every process gets its own; CPU processes talk through gloo. GPUs (bfloat16, several devices)
    take the same path but were not run on the machine where this was written.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    on_cpu = not torch.cuda.is_available()
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory that it has not written; filling it first costs a pass over each tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # made by torch at run time
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic cuBLAS asks for
    precision = resolve_dtype(dtype)
    AcceleratorState._reset_state(reset_partial_state=False)  # the process's last run may have had another precision
    return Accelerator(
        cpu=on_cpu,
        mixed_precision="bf16" if precision == torch.bfloat16 else "no",
    )


@contextmanager
def side_by_side(workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` whose calls run in threads of their own, which divide this thread's threads of torch between them.

    Calls that have not begun when the block ends are forgotten. A single worker is this thread.
    """
    import torch

    if workers == 1:
        yield map
        return
    threads, all_here = torch.get_num_threads(), threading.Barrier(workers + 1)

    def begin() -> None:
        torch.get_num_threads()  # a thread's first call gives it the process's number, over what was set before it
        torch.set_num_threads(max(1, threads // workers))  # of this thread and of the process
        with suppress(threading.BrokenBarrierError):
            all_here.wait()

    pool = ThreadPoolExecutor(workers, "worker", initializer=begin)
    try:
        try:
            for _ in range(workers):
                pool.submit(int)
            all_here.wait()
        finally:
            torch.set_num_threads(threads)
        yield pool.map
    finally:
        all_here.abort()
        pool.shutdown(cancel_futures=True)


def resolve_dtype(name: str) -> torch.dtype:
    """`auto` is bfloat16 on a GPU that computes in it and float32 elsewhere: CPUs mostly lack fast bfloat16."""
    import torch

    if name == "auto":
        name = "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def environment() -> dict[str, str | int]:
    """What bit-exact resume depends on besides the inputs."""
    import accelerate
    import peft
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a subclass of str, which a checkpoint may not hold
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "accelerate": accelerate.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


class StopRequest:
    """Remembers the first signal that asked the run to end, so that the loop can end at a safe point.

    Later signals change nothing: whoever is impatient must not cost the run its checkpoint.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._strikes = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal raise Interrupted wherever the block is.

        For work whose only traces are in memory and in scratch files: reading, building, and an export before it takes
        its name. A library may swallow the exception, or raise one of its own for it; the block ends with it all the
        same.
        """
        try:
            self._strikes = True
            self._end_if_asked()
            yield
        finally:
            self._strikes = False
            self._end_if_asked()

    def _remember(self, signal_number: int, _frame: FrameType | None) -> None:
        if not self.signal_number:
            self.signal_number = signal_number
            if self._strikes:
                self._end_if_asked()

    def _end_if_asked(self) -> None:
        if self.signal_number:
            raise Interrupted(self.signal_number, "stopped between two checkpoints; continue with train --resume")


@contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Turn SIGINT, SIGTERM and SIGUSR1 into a `StopRequest` while the block runs, and let SIGHUP pass.

    So a run outlives its terminal. Only a program's first thread can set handlers; in another one signals stay as
    they are.
    """
    request = StopRequest()
    handlers: dict[signal.Signals, Any] = dict.fromkeys(STOPPING, request._remember)
    if hasattr(signal, "SIGHUP"):
        handlers[signal.SIGHUP] = signal.SIG_IGN
    if threading.current_thread() is not threading.main_thread():
        handlers = {}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_KEPT: list[object] = []


def leave_process_group() -> None:
    """Before the group of processes ends: give gloo's threads the moment they need, then keep the group for good.

    A thread of gloo that has finished an exchange wants the interpreter's lock to let go of its tensors. It would wait
    for ever if the group's destructor, which joins the threads, ran first and held the lock; and at the interpreter's
    exit it would abort the process. While this process sleeps the lock is free.
    """
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        time.sleep(0.2)
        _KEPT.append(torch.distributed.group.WORLD)
