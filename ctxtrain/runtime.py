"""Device, processes, seeds and signals of a run.

Randomness is stateless: code that needs random numbers seeds a new generator from (seed, purpose, epoch, step, …).
Results therefore do not depend on what ran before, and checkpoints need no generator state.
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
from functools import cache
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np

from ctxtrain.errors import Interrupted

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # batch systems send SIGUSR1 before the time limit


class Purpose(IntEnum):
    """The use of a stream of random numbers. Each purpose has a separate stream."""

    HEAD = 1
    SAMPLING = 2
    DROPOUT = 3
    CROP = 4
    PART = 5


def generator(seed: int, purpose: Purpose, *position: int) -> np.random.Generator:
    """A numpy generator whose state depends only on the arguments."""
    return np.random.default_rng(np.random.SeedSequence([seed, purpose, *position]))


def seed_torch(seed: int, purpose: Purpose, *position: int) -> None:
    """Seed torch's global generators with a number that depends only on the arguments."""
    import torch

    words = np.random.SeedSequence([seed, purpose, *position]).generate_state(1, np.uint64)
    number = int(words[0]) & (2**63 - 1)
    torch.default_generator.manual_seed(number)  # torch.manual_seed is slower: it probes every device type
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(number)


def is_main_process() -> bool:
    """Whether this process writes files: it is the only process, or rank 0 under torchrun."""
    return os.environ.get("RANK", "0") == "0"


def process_count() -> int:
    """The number of processes of the run, as torchrun sets it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def make_deterministic() -> None:
    """Let torch use only algorithms that give the same bits each time."""
    import torch

    torch.use_deterministic_algorithms(True)
    # No code here reads uninitialised memory, and filling it costs one pass over each new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # made by torch at run time
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by deterministic cuBLAS


def join_processes() -> None:
    """Under torchrun, join the process group: GPUs exchange gradients through NCCL, CPUs through gloo."""
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available())


def make_accelerator(dtype: torch.dtype) -> Accelerator:
    """Set up the device and precision of this process, and its process group if `join_processes` has not.

    GPUs (bfloat16, several devices) use the same code but were not tested on the development machine.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    make_deterministic()
    AcceleratorState._reset_state(reset_partial_state=False)  # an earlier run in this process may differ in precision
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if dtype == torch.bfloat16 else "no",
    )


def thread_count() -> int:
    """The number of threads of torch in this process; `OMP_NUM_THREADS` sets it."""
    import torch

    return torch.get_num_threads()


@contextmanager
def thread_map(workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """Yield a `map` that runs calls in `workers` threads, which share the torch threads of the calling thread equally.

    Calls that have not started when the block ends are cancelled. With one worker, calls run in the calling thread.
    """
    import torch

    if workers == 1:
        yield map
        return
    threads, all_started = torch.get_num_threads(), threading.Barrier(workers + 1)

    def start_worker() -> None:
        torch.get_num_threads()  # a thread's first call resets its number to that of the process, so call it before set
        torch.set_num_threads(max(1, threads // workers))  # sets the number of this thread and of the process
        with suppress(threading.BrokenBarrierError):
            all_started.wait()

    pool = ThreadPoolExecutor(workers, "worker", initializer=start_worker)
    try:
        try:
            for _ in range(workers):
                pool.submit(int)
            all_started.wait()
        finally:
            torch.set_num_threads(threads)
        yield pool.map
    finally:
        all_started.abort()
        pool.shutdown(cancel_futures=True)


def environment() -> dict[str, str | int]:
    """The software, device, thread and process counts that a bit-exact resume depends on, besides the inputs."""
    import accelerate
    import peft
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a str subclass, which a checkpoint must not contain
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "accelerate": accelerate.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": process_count(),
    }


_kept_groups: list[object] = []


@cache
def _host_group() -> torch.distributed.ProcessGroup | None:
    """The group of all processes whose exchanges take host memory; a GPU's own group would wait for its kernels."""
    import torch.distributed as dist

    if dist.get_backend() == "gloo":
        return None
    group: dist.ProcessGroup = dist.new_group(backend="gloo")
    _kept_groups.append(group)
    return group


def _process_count() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def from_first_process(value: str) -> str:
    """The text that rank 0 passes, in every process; all must call it."""
    import torch.distributed as dist

    texts = [value]
    if _process_count() > 1:
        dist.broadcast_object_list(texts, src=0, group=_host_group())
    return texts[0]


class StopRequest:
    """Records the first stop signal, so that the training loop can end at a safe point.

    Later signals are ignored: pressing Ctrl-C twice must not interrupt the write of a checkpoint.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._interrupts_immediately = False
        self._where = ""

    def number_of_any_process(self) -> int:
        """The largest signal number of all processes, 0 without a signal; all must call it at the same place."""
        if _process_count() == 1:
            return self.signal_number
        import torch
        import torch.distributed as dist

        largest = torch.tensor(self.signal_number)
        dist.all_reduce(largest, dist.ReduceOp.MAX, _host_group())
        return int(largest)

    @contextmanager
    def interrupt_immediately(self, where: str = "stopped between two checkpoints") -> Iterator[None]:
        """Let a signal raise Interrupted at any point of the block; its message begins with `where`.

        Use it for work that only changes memory and scratch files: reading rows, building a model, preparing an export.
        A library may swallow the exception or replace it; the end of the block raises Interrupted in any case.
        """
        try:
            self._interrupts_immediately, self._where = True, where
            self._raise_if_requested()
            yield
        finally:
            self._interrupts_immediately = False
            self._raise_if_requested()

    def _remember(self, signal_number: int, _frame: FrameType | None) -> None:
        if not self.signal_number:
            self.signal_number = signal_number
            if self._interrupts_immediately:
                self._raise_if_requested()

    def _raise_if_requested(self) -> None:
        if self.signal_number:
            raise Interrupted(self.signal_number, f"{self._where}; continue with train --resume")


@contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Record SIGINT, SIGTERM and SIGUSR1 in a `StopRequest` while the block runs, and ignore SIGHUP.

    A run therefore survives its terminal. Python allows signal handlers only in the main thread; in another thread the
    handlers stay unchanged.
    """
    request = StopRequest()
    handlers: dict[signal.Signals, Any] = dict.fromkeys(STOP_SIGNALS, request._remember)
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


def leave_process_group() -> None:
    """Let gloo's threads finish, then keep the process group alive until the process exits.

    After an exchange, a gloo thread needs the GIL to release its tensors. The group's destructor joins these threads
    while it holds the GIL, so it would deadlock; at interpreter exit it would abort the process. The sleep frees the
    GIL, and the kept reference prevents the destructor from running.
    """
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        time.sleep(0.2)
        _kept_groups.append(torch.distributed.group.WORLD)
