"""Process-wide settings: the memory allocator, how threads wait, and the first call of vector math functions."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
DEFAULTS = {M_TRIM_THRESHOLD: 1 << 17, M_TOP_PAD: 1 << 17, M_MMAP_MAX: 1 << 16}  # of glibc's malloc.c
THREAD_HEAP_BYTES = 1 << 26  # HEAP_MAX_SIZE of glibc's arena.c
LOADAVG = Path("/proc/loadavg")
DEVICES = Path("/dev")
LOAD_SAMPLES, SAMPLE_INTERVAL = 5, 0.02  # count, seconds; a load that ends within them does not count
SPIN_COUNT = "10000"


def warm_up_vector_math() -> None:
    """Call each vector math function once on one thread and once on all threads, and discard the results.

    torch computes cosines, exponentials and similar functions with MKL, in parts of 2,048 numbers on all threads. On
    one processor (an Intel with AVX-512 and AMX) the first call of a process from two threads at once returned the
    second thread's part wrong by 1.5e-04 in about one of 14 processes. No later call did.
    """
    import torch

    functions = (torch.cos, torch.sin, torch.exp, torch.log, torch.tanh, torch.sigmoid, torch.erf, torch.rsqrt)
    for dtype in (torch.float32, torch.float64):
        for count in (8, 1 << 15):
            for function in functions:
                function(torch.ones(count, dtype=dtype))


class Allocator:
    """glibc's malloc, where it is the C library, set for the device that computes.

    On a CPU it reuses freed memory and does not return it to the system. Otherwise large tensors use fresh pages in
    every step; each fresh page costs an interrupt and is zeroed. On a GPU, tensors of a step do not lie in it, and what
    loading a base freed belongs to the system. Before torch is imported the device is a guess, which `settle` corrects.
    """

    def __init__(self) -> None:
        self.is_tuned = False  # whether this process asked for it
        self.keeps_freed_memory = False

    def tune(self) -> None:
        """Set it for a CPU, unless this process can see a GPU."""
        self.is_tuned = True
        if not sees_gpu():
            self.keep_freed_memory()

    def settle(self, device_type: str) -> None:
        """Set it for the device that computes, if this process asked for it."""
        if not self.is_tuned:
            return
        if device_type == "cpu":
            self.keep_freed_memory()
        else:
            self.return_freed_memory()

    def keep_freed_memory(self) -> None:
        """Keep freed memory from now on."""
        if not self.keeps_freed_memory:
            _set_malloc({M_TOP_PAD: THREAD_HEAP_BYTES, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1})
            self.keeps_freed_memory = True

    def return_freed_memory(self) -> None:
        """Return what is free to the system, and set glibc's limits for what will be freed; they no longer grow."""
        _set_malloc(DEFAULTS)
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
        if trim is not None:
            trim(0)
        self.keeps_freed_memory = False


allocator = Allocator()


def sees_gpu() -> bool:
    """Whether the driver of an NVIDIA or AMD GPU is there and CUDA_VISIBLE_DEVICES does not hide it. Imports no torch.

    torch may still compute on the CPU, for example because it was installed without CUDA.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    return any((DEVICES / name).exists() for name in ("nvidiactl", "dxg", "kfd"))


def _set_malloc(settings: dict[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        for name, value in settings.items():  # without a large top pad, glibc returns a thread's heap once it is free
            mallopt(name, value)


def set_thread_waiting() -> None:
    """Set the environment variable that OpenMP reads when torch is imported, unless the user has set one.

    Waiting threads of torch spin for about a tenth of a millisecond and then sleep: on a virtual machine, waking a
    thread takes as long as a small operator. If other programs need the cores, threads sleep immediately; spinning
    threads would take the cores from each other.
    """
    if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ:
        os.environ["GOMP_SPINCOUNT"] = "0" if _is_machine_busy() else SPIN_COUNT


def _is_machine_busy() -> bool:
    """Whether other programs occupy more than a fourth of the machine's cores in each of a few samples."""
    for _ in range(LOAD_SAMPLES):
        try:
            running = int(LOADAVG.read_text(encoding="ascii").split()[3].partition("/")[0])
        except (OSError, ValueError, IndexError):  # only Linux has it
            return False
        if (running - 1) * 4 <= (os.cpu_count() or 1):  # one of them is this process
            return False
        time.sleep(SAMPLE_INTERVAL)
    return True
