"""Columns that grow while a file is read and are stored on disk, so that memory does not grow with the number of rows.

Input: entries, one by one. Output: a read-only, memory-mapped array. The file is unnamed, so the system removes it
however the process ends.
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
    """If writing to the temporary folder fails, raise an OSError that names the folder and what was being written."""
    try:
        yield
    except OSError as error:
        where = f"{what} in {tempfile.gettempdir()}; set TMPDIR to another folder"
        raise OSError(error.errno, error.strerror, where) from error


class DiskColumn:
    """Entries of one numpy dtype; a structured dtype stores several numbers per entry.

    A short column stays in memory, without a file. Raises OSError if the disk is full.
    """

    def __init__(self, dtype: DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self._pending: list[Any] = []
        self._file: IO[bytes] | None = None
        self._written = 0

    def __len__(self) -> int:
        return self._written + len(self._pending)

    def append(self, entry: Any) -> None:
        self._pending.append(entry)
        self._flush(ENTRIES_IN_MEMORY)

    def extend(self, entries: Sequence[Any]) -> None:
        self._pending.extend(entries)
        self._flush(ENTRIES_IN_MEMORY)

    def array(self) -> NDArray[Any]:
        """All entries so far, read-only, of shape (entries,)."""
        if self._file is None:
            entries = np.array(self._pending, dtype=self.dtype)
            entries.flags.writeable = False
            return entries
        self._flush(1)
        with temporary_disk("columns of the rows"):
            self._file.flush()
        # The mapping stays valid after the file is closed.
        mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapped, dtype=self.dtype)

    def _flush(self, min_entries: int) -> None:
        """Write the pending entries if there are at least `min_entries`."""
        if len(self._pending) < min_entries:
            return
        with temporary_disk("columns of the rows"):
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the column
                weakref.finalize(self, self._file.close)
            self._file.write(np.array(self._pending, dtype=self.dtype).tobytes())
        self._written += len(self._pending)
        self._pending.clear()
