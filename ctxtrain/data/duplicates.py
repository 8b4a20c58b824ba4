"""Rows that are the same window, and rows that only look alike.

Input: the `Survey` of each file, keys that equal rows share, and window positions. Output: pairs of rows.

Two rows with the same key are the same window if they have the same position, or if one of them has none. Quiet markets
look alike for hours, and pegged symbols look alike at one moment. A window with few changes therefore equals another
only if both have a position and a symbol, and these agree. Otherwise the pair is a look-alike, which is reported and
not refused. Windows with many changes cannot be equal by chance, so an overlap in time suffices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.positions import Bools, Spans
from ctxtrain.data.profile import Survey

DIFFERENT_TIME = "same bars at a different time"
LOOK_ALIKES = "look-alike quiet windows"
# Number of bars that differ from the previous bar. One tick up and down again gives two changes, two such ticks four.
MIN_CHANGES, MANY_CHANGES = 5, 10
CHUNK = 65_536  # rows compared at a time
Row = tuple[str, int]
Hashes = NDArray[np.uint64]
Span = tuple[int, int]


class RowKeys:
    """A 16-byte key for each row of each file; rows may be excluded.

    `halves` holds one array of shape (rows, 2) per file.
    """

    def __init__(self, halves: Mapping[str, Hashes], excluded: Mapping[str, Bools] | None = None) -> None:
        self.halves = halves
        self._excluded = excluded or {}

    def included(self, name: str) -> Bools:
        """Whether each row of the file is included, of shape (rows,)."""
        excluded = self._excluded.get(name)
        return np.ones(len(self.halves[name]), dtype=np.bool_) if excluded is None else ~excluded

    def without(self, name: str, rows: Bools) -> RowKeys:
        """The same keys with more rows of one file excluded."""
        return RowKeys(self.halves, {**self._excluded, name: rows | ~self.included(name)})

    def of(self, name: str, row: int) -> bytes:
        key: bytes = self.halves[name][row].tobytes()
        return key

    def common(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """Rows of two files whose keys occur in both."""
        # Comparing the first half of each key is fast and leaves few candidates; the whole keys decide below.
        small, large = sorted((first, second), key=lambda name: len(self.halves[name]))
        in_large = self._rows_with(large, self.halves[small][self.included(small), 0])
        in_small = self._rows_with(small, self.halves[large][in_large, 0])
        in_first, in_second = (in_small, in_large) if small == first else (in_large, in_small)
        both = {self.of(first, row) for row in in_first} & {self.of(second, row) for row in in_second}
        return (
            [row for row in in_first if self.of(first, row) in both],
            [row for row in in_second if self.of(second, row) in both],
        )

    def _rows_with(self, name: str, values_N: Hashes) -> list[int]:
        """Included rows of a file whose first half is among the values; by chunks, so that only these take memory."""
        ordered, rows = np.unique(values_N), list[int]()
        if not len(ordered):
            return rows
        for start in range(0, len(self.halves[name]), CHUNK):
            part_N = self.halves[name][start : start + CHUNK, 0]
            nearest_N = ordered[np.minimum(np.searchsorted(ordered, part_N), len(ordered) - 1)]
            rows += (start + np.flatnonzero(nearest_N == part_N)).tolist()
        excluded = self._excluded.get(name)
        return rows if excluded is None else [row for row in rows if not excluded[row]]


class DuplicateFinder:
    """Compares rows of files by keys and positions."""

    def __init__(self, surveys: Mapping[str, Survey], spans: Spans | None) -> None:
        self.surveys = surveys
        self.spans = spans
        self.contents = RowKeys({name: surveyed.contents_N2 for name, surveyed in surveys.items()})

    def pairs(self, files: tuple[str, str], keys: RowKeys) -> list[tuple[int, int]]:
        """Rows of the second file that also occur in the first, each after its match in the first."""
        return [(twin, row) for twin, row in self._across(files, keys, MIN_CHANGES) if twin is not None]

    def alike(self, files: tuple[str, str], keys: RowKeys) -> dict[int, int]:
        """Rows of the second file that look like a row of the first, with that row as value.

        Something changes in these windows, but too little to call the two rows the same window.
        """
        second = files[1]
        keys = keys.without(second, self.surveys[second].changes_N >= MIN_CHANGES)
        if not keys.included(second).any():
            return {}
        same = {row for _, row in self.pairs(files, keys)}
        return {row: twin for twin, row in self._across(files, keys, 1) if twin is not None and row not in same}

    def moved(self, files: tuple[str, str]) -> list[tuple[int, int]]:
        """Rows of the second file with many changes that equal a row of the first except for the position."""
        first, second = files
        keys = self.contents
        unmatched = [row for twin, row in self._across(files, keys, MIN_CHANGES) if twin is None]
        if not unmatched:
            return []
        row_of_key = {keys.of(first, row): row for row in keys.common(first, second)[0]}
        distinctive = [row for row in unmatched if self.changes((second, row)) >= MANY_CHANGES]
        return [(row_of_key[keys.of(second, row)], row) for row in distinctive]

    def repeated(self) -> Iterator[tuple[Row, Row]]:
        """Pairs of an earlier row of any file and a later row with the same window."""
        halves = self.contents.halves
        values, counts = np.unique(np.concatenate([keys[:, 0] for keys in halves.values()]), return_counts=True)
        repeated_halves = values[counts > 1]  # candidates only; `find` compares whole keys
        earlier = _SeenRows(self, MIN_CHANGES)
        for name, keys in halves.items():
            for row in np.flatnonzero(np.isin(keys[:, 0], repeated_halves)).tolist():
                key = self.contents.of(name, row)
                twin = earlier.find(key, (name, row))
                if twin is None:
                    earlier.add(key, (name, row))
                else:
                    yield twin, (name, row)

    def _across(self, files: tuple[str, str], keys: RowKeys, min_changes: int) -> Iterator[tuple[int | None, int]]:
        """Rows of the second file whose key occurs in the first, each after a row that is the same window, or None.

        Windows with fewer changes than `min_changes` are the same only at one position and of one symbol.
        """
        first, second = files
        earlier = _SeenRows(self, min_changes)
        first_rows, second_rows = keys.common(first, second)
        for row in first_rows:
            earlier.add(keys.of(first, row), (first, row))
        for row in second_rows:
            twin = earlier.find(keys.of(second, row), (second, row))
            yield (twin[1] if twin else None), row

    def span(self, row: Row) -> Span | None:
        name, n = row
        if self.spans is None or not self.spans.placed_N[name][n]:
            return None
        return int(self.spans.first_N[name][n]), int(self.spans.last_N[name][n])

    def changes(self, row: Row) -> int:
        return int(self.surveys[row[0]].changes_N[row[1]])

    def symbol(self, row: Row) -> str:
        return self.surveys[row[0]].positions.symbol(row[1])


class _SeenRows:
    """Rows seen so far, indexed by key and position."""

    def __init__(self, twins: DuplicateFinder, min_changes: int) -> None:
        self._twins = twins
        self._min_changes = min_changes
        self._by_symbol: dict[tuple[bytes, Span, str], Row] = {}
        self._by_span: dict[tuple[bytes, Span], Row] = {}
        self._unpositioned: dict[bytes, Row] = {}
        self._by_key: dict[bytes, Row] = {}
        self._many_changes: dict[bytes, list[tuple[Span, Row]]] = {}

    def add(self, key: bytes, row: Row) -> None:
        span, changes = self._twins.span(row), self._twins.changes(row)
        if span:
            self._by_symbol.setdefault((key, span, self._twins.symbol(row)), row)
        if changes < self._min_changes:
            return
        self._by_key.setdefault(key, row)
        if not span:
            self._unpositioned.setdefault(key, row)
        else:
            self._by_span.setdefault((key, span), row)
            if changes >= MANY_CHANGES:
                self._many_changes.setdefault(key, []).append((span, row))

    def find(self, key: bytes, row: Row) -> Row | None:
        """A row seen before that is the same window, or None."""
        span, changes = self._twins.span(row), self._twins.changes(row)
        if span and (twin := self._by_symbol.get((key, span, self._twins.symbol(row)))):
            return twin
        if changes < self._min_changes:
            return None
        if not span:
            return self._by_key.get(key)
        twin = self._unpositioned.get(key) or self._by_span.get((key, span))
        if twin is None and changes >= MANY_CHANGES:
            candidates = self._many_changes.get(key, ())
            twin = next((other for seen, other in candidates if seen[0] <= span[1] and span[0] <= seen[1]), None)
        return twin
