"""Process-wide settings: the memory allocator, how threads wait, and the first call of vector math functions."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
THREAD_HEAP_BYTES = 1 << 26  # HEAP_MAX_SIZE of glibc's arena.c
LOADAVG = Path("/proc/loadavg")
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


def keep_freed_memory() -> None:
    """Make glibc, where it is the C library, reuse freed memory and not return it to the system.

    Otherwise large tensors use fresh pages in every step; each fresh page costs an interrupt and is zeroed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_TOP_PAD, THREAD_HEAP_BYTES)  # otherwise glibc returns a thread's heap once all of it is free
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


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
