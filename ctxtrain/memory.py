"""Recognise out-of-memory errors of any library and raise them as OutOfMemory.

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

from ctxtrain.errors import CtxtrainError, OutOfMemory

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


def free_memory() -> None:
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
