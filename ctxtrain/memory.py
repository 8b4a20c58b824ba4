"""Free memory, and out-of-memory errors of any library, raised as OutOfMemory.

Input: a description of what a block of code does, and a remedy. Output: an OutOfMemory with both in its message, and
the size of the failed allocation if the library reports it.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ctxtrain.errors import CtxtrainError, OutOfMemory

if TYPE_CHECKING:
    import torch

REMEDY = "Free memory or use fewer rows, and run the command again; files that it has finished are complete"
TRAINING_REMEDY = (
    "Free memory and continue with --resume, or start again in another output_dir with a smaller "
    "training.batch_size, model.max_tokens or model.base"
)
# Messages of torch on a CPU, CUDA, C++ and ONNX Runtime, the C library, Python's threads and the dynamic linker. The
# lookaheads exclude linker errors with the same text but another cause: a noexec file system, a full static TLS block.
_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|DefaultCPUAllocator|CUDA out of memory|bad_alloc|bad allocation|"
    r"[Cc]annot allocate memory(?! in static TLS block)|[Ff]ailed to allocate memory|[Uu]nable to allocate|"
    r"can't start new thread|"
    r"failed to map segment from shared object(?!: (?:Operation not permitted|Permission denied))|"
    r"cannot (?:map zero-fill pages|create shared object descriptor|allocate (?:TLS|dependency|symbol search))"
)
_ALLOCATION_SIZE = re.compile(
    r"(?:[Tt]ried to allocate|[Uu]nable to allocate|buffer of size) ([0-9.,]+)(?: ?([KMGTPE]i?B|bytes))?"
)

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def available_memory(device: torch.device) -> int | None:
    """Bytes that tensors of this process may take on a device; None if unknown.

    Processes of one machine share its memory equally; each has a GPU of its own.
    """
    if device.type != "cuda":
        free = free_host_memory()
        return free if free is None else free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return gpu_memory(device)


def gpu_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, and those that torch's allocator keeps unused."""
    import torch

    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + cached


def free_host_memory() -> int | None:
    """Bytes that new tensors of this process may take: available memory, or what its control groups still allow.

    None where the system does not say (it is not Linux).
    """
    try:
        lines = (PROC / "meminfo").read_text(encoding="ascii").splitlines()
        available = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
        own = [line.partition("::")[2] for line in (PROC / "self" / "cgroup").read_text().splitlines()]
    except (OSError, ValueError, StopIteration):
        return None
    groups = {CGROUPS} | {CGROUPS / path.lstrip("/") for path in own if path}
    groups |= {parent for group in groups for parent in group.parents if CGROUPS in parent.parents}
    limits = [free for group in sorted(groups) if (free := _free_in_group(group)) is not None]
    return max(0, min([available, *limits]))


def _free_in_group(group: Path) -> int | None:
    """Bytes below the limit of a control group (version 2); the page cache that it can drop counts as free."""
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or "max"
        return None
    return limit - used + int(stat.get("inactive_file", 0))


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or an error in its chain of causes, reports a failed memory allocation."""
    while error is not None:
        if isinstance(error, CtxtrainError):
            return isinstance(error, OutOfMemory)
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return True
        if (isinstance(error, OSError) and error.errno == errno.ENOMEM) or _OUT_OF_MEMORY.search(str(error)):
            return True
        error = error.__cause__
    return False


def mentions_out_of_memory(traceback: str) -> bool:
    """Whether the traceback of another process reports a failed memory allocation."""
    return bool(_OUT_OF_MEMORY.search(traceback)) or "MemoryError" in traceback


def out_of_memory_message(error: BaseException, doing: str, remedy: str = REMEDY) -> str:
    """The message: what was being done, the size of the failed allocation if known, and the remedy."""
    match = _ALLOCATION_SIZE.search(str(error))
    allocation = f" (an allocation of {_format_size(match[1], match[2])} failed)" if match else ""
    return f"memory ran out {doing}{allocation}. {remedy}."


@contextmanager
def annotate_memory_errors(doing: str, remedy: str = REMEDY) -> Iterator[None]:
    """Convert out-of-memory errors of libraries in the block to OutOfMemory; other errors pass unchanged."""
    try:
        yield
    except CtxtrainError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(out_of_memory_message(error, doing, remedy)) from error


def release_memory() -> None:
    """Give memory that no object uses to the system, so that another process can have it.

    Cycles, such as the patched `forward` of accelerate, keep a model until the collector runs; torch keeps a pool of a
    GPU's memory, and glibc may keep the computer's (`engine/tuning.py`).
    """
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _format_size(number: str, unit: str | None) -> str:
    if unit not in (None, "bytes"):
        return f"{number} {unit}"
    count = number.rstrip(".,").replace(",", "")
    return f"{int(count):,} bytes" if count.isdigit() else number
