"""What is set for a whole process: the allocator, how threads wait, and the first call of vector mathematics."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
HEAP_OF_A_THREAD = 1 << 26  # bytes, HEAP_MAX_SIZE of glibc's arena.c
LOADAVG = Path("/proc/loadavg")
LOOKS, BETWEEN = 5, 0.02  # seconds: what runs for a moment only is none of our business
SPINS = "10000"


def enter_vector_math() -> None:
    """Call each function of vector mathematics once on one thread and then on all, for nothing.

    torch takes cosines, exponentials and the like from MKL, in parts of 2,048 numbers on all threads. On one processor
    (an Intel with AVX-512 and AMX) the first call of a process by two threads at once gave the second thread's part
    wrong by 1.5e-04 in about one of 14 processes; no later call ever did.
    """
    import torch

    functions = (torch.cos, torch.sin, torch.exp, torch.log, torch.tanh, torch.sigmoid, torch.erf, torch.rsqrt)
    for dtype in (torch.float32, torch.float64):
        for count in (8, 1 << 15):
            for function in functions:
                function(torch.ones(count, dtype=dtype))


def keep_freed_memory() -> None:
    """Tell glibc, where there is one, to use freed memory again and not to return it to the system.

    Large tensors otherwise come from fresh pages in every step, and each page costs an interrupt and is zeroed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_TOP_PAD, HEAP_OF_A_THREAD)  # or a thread's heap goes back when all of it is free
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def settle_waiting() -> None:
    """Set what libraries read from the environment when they are imported, unless the user has set it.

    Threads of torch that wait for each other spin for some tenth of a millisecond and then sleep: to be woken takes a
    virtual machine as long as a small operator. Where others want the cores they sleep at once, or they would starve
    each other.
    """
    if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ:
        os.environ["GOMP_SPINCOUNT"] = "0" if _others_want_cores() else SPINS


def _others_want_cores() -> bool:
    """Whether more than a fourth of the machine's cores have work that is not ours, at each of a few looks."""
    for _ in range(LOOKS):
        try:
            running = int(LOADAVG.read_text(encoding="ascii").split()[3].partition("/")[0])
        except (OSError, ValueError, IndexError):  # only Linux has it
            return False
        if (running - 1) * 4 <= (os.cpu_count() or 1):  # one of them is this process
            return False
        time.sleep(BETWEEN)
    return True
