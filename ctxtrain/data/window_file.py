"""The windows of one source of rows, parsed once and then read from a table on disk.

Input: the path of a file, a URL, rows in memory, or another `Source`. Output: all or selected windows, which can be
iterated any number of times.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from copy import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.parse_report import ParseReport, parse_rows
from ctxtrain.data.parse_window import Window
from ctxtrain.data.row_schema import NO_FIELDS, OwnFields
from ctxtrain.data.sources import Source, open_source
from ctxtrain.data.table import TableWriter, WindowTable
from ctxtrain.data.table_cache import TableCache

Ints = NDArray[np.int64]


class _ParsedFile:
    """Parse result of one source, shared by all `WindowFile`s of its rows."""

    def __init__(self, source: Source) -> None:
        self.report = ParseReport(source.name)
        self.is_parsed = False
        self.table: WindowTable | None = None


class WindowFile:
    """The windows of one file, or a selection of them; the file need not fit into memory.

    Invalid rows are skipped; `report` describes the complete pass over the file. The first iteration parses the file
    and writes a `WindowTable`; later ones read the table. So each row is parsed once, a pipe can be read again, and the
    file may change or disappear. `own` are the bar fields that the user declares. `cache` is a folder that keeps the
    table for later processes. `keep=False` writes no table and allows one iteration. Iteration raises DataError if the
    file cannot be read.
    """

    def __init__(
        self,
        source: object,
        *,
        labelled: bool = True,
        keep: bool = True,
        cache: TableCache | None = None,
        own: OwnFields = NO_FIELDS,
    ) -> None:
        self.source = open_source(source)
        self.labelled = labelled
        self.own = own
        self.dropped = 0
        self._keep = keep
        self._cache = cache
        self._parsed = _ParsedFile(self.source)
        self._rows: Ints | None = None

    @property
    def report(self) -> ParseReport:
        return self._parsed.report

    @property
    def source_key(self) -> object:
        """Equal for all `WindowFile`s that select rows of the same file."""
        return self._parsed

    def take(self, rows: Ints) -> WindowFile:
        """These rows, numbered within this selection, in the given order. The file must have been read."""
        selection = copy(self)
        selection._rows = rows if self._rows is None else self._rows[rows]
        return selection

    def without(self, rows: Ints) -> WindowFile:
        """All other rows; `dropped` counts the removed ones."""
        remaining = self.take(np.delete(np.arange(len(self)), rows))
        remaining.dropped = self.dropped + len(rows)
        return remaining

    def __len__(self) -> int:
        """Number of windows. Raises TypeError before the first pass, which `list` takes as no length hint."""
        if not self._parsed.is_parsed:
            raise TypeError(f"the length of {self.source.name} is unknown until the file has been read once")
        return self.report.good if self._rows is None else len(self._rows)

    def __iter__(self) -> Iterator[Window]:
        if self._parsed.table is None:
            self._parsed.table = self._cached()
        if self._parsed.table is None:
            return self._parse()
        return self._parsed.table.windows(self.report.prefix, self._rows)

    def row_numbers(self) -> Ints:
        """The number of each window among all windows of the file."""
        return np.arange(len(self)) if self._rows is None else self._rows

    def name(self, row: int) -> str:
        """Name of a row in messages: its id, file and line."""
        location = f"{self.report.prefix}{self._value('line', row)}"
        row_id = self.id(row)
        return f"{row_id} ({location})" if row_id else location

    def id(self, row: int) -> str | None:
        value: str | None = self._value("id", row)
        return value

    def sha256(self) -> str:
        """SHA-256 of the file as stored, compressed or not. Rows that can be read only once are read for it."""
        if not self.report.sha256 and not self.source.is_stored:
            for _ in self:
                pass
        if not self.report.sha256:
            self.report.sha256 = self.source.sha256()
        return self.report.sha256

    def _value(self, column: str, row: int) -> Any:
        assert self._parsed.table is not None, "the file has not been read yet"
        return self._parsed.table.value(column, int(self.row_numbers()[row]))

    def _cached(self) -> WindowTable | None:
        """The table that an earlier process stored for this content."""
        if self._cache is None or not self.source.is_stored:
            return None
        entry = self._cache.load(self.sha256(), labelled=self.labelled, own=self.own)
        if entry is None:
            return None
        table, stored_report = entry
        try:
            self._parsed.report = ParseReport.from_dict(stored_report, self.source.name, self.sha256())
        except (KeyError, TypeError, ValueError, AttributeError):  # the stored report has another format
            return None
        self._parsed.is_parsed = True
        self.source.release()
        return table

    def _parse(self) -> Iterator[Window]:
        report = ParseReport(self.source.name)
        cache = self._cache if self.source.is_stored else None
        with (
            (TableWriter(own=self.own) if cache is None else cache.writer(self.own))
            if self._keep
            else nullcontext() as writer
        ):
            with self.source.open(report) as rows:
                for window in parse_rows(rows, report, labelled=self.labelled, own=self.own):
                    if writer:
                        writer.add(int(window.location.removeprefix(report.prefix)), window)
                    yield window
            self.source.release()
            self._parsed.report, self._parsed.is_parsed = report, True
            if writer and cache and not report.faults:
                self._parsed.table = cache.store(
                    writer, report.to_dict(), report.sha256, labelled=self.labelled, own=self.own
                )
            elif writer:
                self._parsed.table = writer.finish()


def load_windows(source: object, *, labelled: bool = True, own: OwnFields = NO_FIELDS) -> list[Window]:
    """All windows of a path, a URL or rows in memory. Raises DataError with the faults of all invalid rows."""
    file = WindowFile(source, labelled=labelled, keep=False, own=own)
    windows = list(file)
    file.report.refuse_faults()
    return windows
