"""The windows of one file, parsed once and then read from a table on disk.

Comes in: the path of a file. Goes out: its windows, all or chosen ones, as often as they are walked through.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import nullcontext
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.formats import Reading, file_sha256, open_lines, parse_lines
from ctxtrain.data.parse_window import Window
from ctxtrain.data.table import TableWriter, WindowTable
from ctxtrain.data.table_cache import TableCache

Ints = NDArray[np.int64]


class _Parsed:
    """What one file gave: shared by all `WindowFile`s of its rows."""

    def __init__(self, path: Path) -> None:
        self.reading = Reading(str(path))
        self.walked = False
        self.table: WindowTable | None = None


class WindowFile:
    """The windows of one file, or chosen ones of them, so that no file has to fit into memory.

    Rows with faults are left out; `reading` has what the whole walk over the file found. The first walk parses the file
    and writes a `WindowTable`, and all others read that: a row is parsed once, a pipe can be walked again, and the file
    may change or go. `cache` is a folder that keeps the table for later processes; `keep=False` is for a single walk,
    and writes none. A walk raises DataError if the file cannot be read at all.
    """

    def __init__(
        self, path: str | Path, *, labelled: bool = True, keep: bool = True, cache: TableCache | None = None
    ) -> None:
        self.path = Path(path)
        self.labelled = labelled
        self.dropped = 0
        self._keep = keep
        self._cache = cache
        self._parsed = _Parsed(self.path)
        self._rows: Ints | None = None

    @property
    def reading(self) -> Reading:
        return self._parsed.reading

    @property
    def whole(self) -> object:
        """Equal for `WindowFile`s whose rows are of one file."""
        return self._parsed

    def take(self, rows: Ints) -> WindowFile:
        """These rows in the order given, by their number among those of this one. The file was walked before."""
        chosen = copy(self)
        chosen._rows = rows if self._rows is None else self._rows[rows]
        return chosen

    def without(self, rows: Ints) -> WindowFile:
        """All but these rows; `dropped` counts them."""
        left = self.take(np.delete(np.arange(len(self)), rows))
        left.dropped = self.dropped + len(rows)
        return left

    def __len__(self) -> int:
        """Windows, known after the first walk. Before it, TypeError is raised, which `list` takes for no hint."""
        if not self._parsed.walked:
            raise TypeError(f"the length of {self.path} is known only after its first walk")
        return self.reading.good if self._rows is None else len(self._rows)

    def __iter__(self) -> Iterator[Window]:
        if self._parsed.table is None:
            self._parsed.table = self._cached()
        if self._parsed.table is None:
            return self._parse()
        return self._parsed.table.windows(str(self.path), self._rows)

    def row_numbers(self) -> Ints:
        """The number of each window among all of the file."""
        return np.arange(len(self)) if self._rows is None else self._rows

    def name(self, row: int) -> str:
        """What messages call a row: its id, file and line."""
        place = f"{self.path}:{self._value('line', row)}"
        identity = self.id(row)
        return f"{identity} ({place})" if identity else place

    def id(self, row: int) -> str | None:
        found: str | None = self._value("id", row)
        return found

    def sha256(self) -> str:
        """Of the file's own bytes, also where they are compressed. A pipe is walked for it, as it gives them once."""
        if not self.reading.sha256 and self._keep and not self.path.is_file():
            for _ in self:
                pass
        if not self.reading.sha256:
            self.reading.sha256 = file_sha256(self.path)
        return self.reading.sha256

    def _value(self, column: str, row: int) -> Any:
        assert self._parsed.table is not None, "the file is walked first"
        return self._parsed.table.value(column, int(self.row_numbers()[row]))

    def _cached(self) -> WindowTable | None:
        """The table that an earlier process made of this content."""
        if self._cache is None or not self.path.is_file():
            return None
        found = self._cache.find(self.sha256(), labelled=self.labelled)
        if found is None:
            return None
        table, kept = found
        try:
            self._parsed.reading = Reading.kept(kept, str(self.path), self.sha256())
        except (KeyError, TypeError, ValueError, AttributeError):  # beside the table stands something else
            return None
        self._parsed.walked = True
        return table

    def _parse(self) -> Iterator[Window]:
        reading = Reading(str(self.path))
        digest = hashlib.sha256()
        cache = self._cache if self.path.is_file() else None
        with (TableWriter() if cache is None else cache.writer()) if self._keep else nullcontext() as writer:
            with open_lines(self.path, digest) as lines:
                for window in parse_lines(lines, reading, labelled=self.labelled):
                    if writer:
                        writer.add(int(window.place.rpartition(":")[2]), window)
                    yield window
            reading.sha256 = digest.hexdigest()
            self._parsed.reading, self._parsed.walked = reading, True
            if writer and cache and not reading.faults:
                self._parsed.table = cache.keep(writer, reading.to_keep(), reading.sha256, labelled=self.labelled)
            elif writer:
                self._parsed.table = writer.finish()


def load_windows(path: str | Path, *, labelled: bool = True) -> list[Window]:
    """All windows of a file at once. Raises DataError with the faults of every bad row."""
    file = WindowFile(path, labelled=labelled, keep=False)
    windows = list(file)
    file.reading.refuse_faults()
    return windows
