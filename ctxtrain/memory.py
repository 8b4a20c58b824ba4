"""Memory that runs out is told as such, whichever library notices it.

Comes in: what a block of work does and what would make it need less. Goes out: an OutOfMemory that says both, and how
much was asked for where the library says so.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from ctxtrain.errors import CtxtrainError, OutOfMemory

REMEDY = "Close what else takes memory, or give less at a time, and run again; what was finished is whole"
SMALLER = (
    "Close what else takes memory and go on with --resume, or start again, in another output_dir, with a smaller "
    "training.batch_size, model.max_tokens or model.base"
)
# torch on a CPU, CUDA, C++ and ONNX Runtime, the system's own words, Python's threads; then the loader of libraries,
# which says the same where a file system lets nothing run, and of its own small room for thread-local data.
_SAID = re.compile(
    r"can't allocate memory|DefaultCPUAllocator|CUDA out of memory|bad_alloc|bad allocation|"
    r"[Cc]annot allocate memory(?! in static TLS block)|[Ff]ailed to allocate memory|[Uu]nable to allocate|"
    r"can't start new thread|"
    r"failed to map segment from shared object(?!: (?:Operation not permitted|Permission denied))|"
    r"cannot (?:map zero-fill pages|create shared object descriptor|allocate (?:TLS|dependency|symbol search))"
)
_ASKED = re.compile(
    r"(?:[Tt]ried to allocate|[Uu]nable to allocate|buffer of size) ([0-9.,]+)(?: ?([KMGTPE]i?B|bytes))?"
)


def ran_out(error: BaseException | None) -> bool:
    """Whether an error, or the one behind it, says that there was no memory."""
    while error is not None:
        if isinstance(error, CtxtrainError):
            return isinstance(error, OutOfMemory)
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return True
        if (isinstance(error, OSError) and error.errno == errno.ENOMEM) or _SAID.search(str(error)):
            return True
        error = error.__cause__
    return False


def out_of_memory(traceback: str) -> bool:
    """The same of what another process said at its end."""
    return bool(_SAID.search(traceback)) or "MemoryError" in traceback


def told(error: BaseException, doing: str, remedy: str = REMEDY) -> str:
    """The message: what was being done, what was asked for where that is known, and the remedy."""
    found = _ASKED.search(str(error))
    asked = f", which asked for {_size(found[1], found[2])} more" if found else ""
    return f"memory ran out {doing}{asked}. {remedy}."


@contextmanager
def needed_for(doing: str, remedy: str = REMEDY) -> Iterator[None]:
    """Turn what a library raises for want of memory in the block into an OutOfMemory."""
    try:
        yield
    except CtxtrainError:
        raise
    except Exception as error:
        if not ran_out(error):
            raise
        raise OutOfMemory(told(error, doing, remedy)) from error


def _size(number: str, unit: str | None) -> str:
    if unit not in (None, "bytes"):
        return f"{number} {unit}"
    count = number.rstrip(".,").replace(",", "")
    return f"{int(count):,} bytes" if count.isdigit() else number
