"""Columns that grow while a file is read and then stay on disk, so that memory does not grow with rows.

Comes in: entries, one by one. Goes out: a read-only array that is memory-mapped. Its file has no name, so the system
removes it however the process ends.
"""

from __future__ import annotations

import mmap
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

ENTRIES_IN_MEMORY = 4096


@contextmanager
def temporary_disk(what: str) -> Iterator[None]:
    """Name the folder of temporary files where its disk takes no more. Raises OSError with `what` it was for."""
    try:
        yield
    except OSError as error:
        where = f"{what} in {tempfile.gettempdir()}; TMPDIR names another folder"
        raise OSError(error.errno, error.strerror, where) from error


class DiskColumn:
    """Entries of one numpy dtype; a structured dtype holds several numbers an entry.

    A short column stays in memory and has no file. Raises OSError if the disk is full.
    """

    def __init__(self, dtype: DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self._waiting: list[Any] = []
        self._file: IO[bytes] | None = None
        self._written = 0

    def __len__(self) -> int:
        return self._written + len(self._waiting)

    def append(self, entry: Any) -> None:
        self._waiting.append(entry)
        self._flush(ENTRIES_IN_MEMORY)

    def extend(self, entries: Sequence[Any]) -> None:
        self._waiting.extend(entries)
        self._flush(ENTRIES_IN_MEMORY)

    def array(self) -> NDArray[Any]:
        """All entries so far, of shape (entries,), read-only."""
        if self._file is None:
            found = np.array(self._waiting, dtype=self.dtype)
            found.flags.writeable = False
            return found
        self._flush(1)
        with temporary_disk("columns of the rows"):
            self._file.flush()
        mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)  # it outlives the file
        return np.frombuffer(mapped, dtype=self.dtype)

    def _flush(self, least: int) -> None:
        """Write what waits, if it is at least so much."""
        if len(self._waiting) < least:
            return
        with temporary_disk("columns of the rows"):
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115  # closed when the column goes
                weakref.finalize(self, self._file.close)
            self._file.write(np.array(self._waiting, dtype=self.dtype).tobytes())
        self._written += len(self._waiting)
        self._waiting.clear()
