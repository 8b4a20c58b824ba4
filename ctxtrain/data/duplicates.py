"""Which rows are the same window, and which only look alike.

Comes in: the `Survey` of each file, keys that equal rows share, and where windows lie. Goes out: pairs of rows.

Rows of one key are the same window if they stand at the same place, or if one does not say where it stands. A quiet
market looks alike for hours, and pegged ones look alike at one moment. So a window in which little changes is the same
as another only if both say so: of one symbol, at one place. Without that it is a look-alike, which is told and not
refused. Windows in which much changes cannot be equal by chance, so they need only overlap.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.positions import Bools, Spans
from ctxtrain.data.profile import Survey

ANOTHER_TIME = "same bars at another time"
LOOK_ALIKE = "quiet windows alike"
# Bars that differ from the bar before: one tick there and back again are two, and two such ticks four.
ENOUGH, MUCH = 5, 10
Row = tuple[str, int]
Hashes = NDArray[np.uint64]
Span = tuple[int, int]


class Keys:
    """A key of 16 bytes for each row of each file, of which some rows may be left out.

    `halves` has by file an array of shape (rows, 2), and `used` an array of shape (rows,).
    """

    def __init__(self, halves: Mapping[str, Hashes], left_out: Mapping[str, Bools] | None = None) -> None:
        self.halves = halves
        self._left_out = left_out or {}

    def used(self, name: str) -> Bools:
        left_out = self._left_out.get(name)
        return np.ones(len(self.halves[name]), dtype=np.bool_) if left_out is None else ~left_out

    def without(self, name: str, rows: Bools) -> Keys:
        """The same keys with more rows of a file left out."""
        return Keys(self.halves, {**self._left_out, name: rows | ~self.used(name)})

    def of(self, name: str, row: int) -> bytes:
        key: bytes = self.halves[name][row].tobytes()
        return key

    def common(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """Rows of two files whose keys stand in both."""
        rows = {name: np.flatnonzero(self.used(name)) for name in (first, second)}
        one, other = (self.halves[name][rows[name], 0] for name in (first, second))  # half a key finds candidates
        found = (rows[first][np.isin(one, other)].tolist(), rows[second][np.isin(other, one)].tolist())
        both = {self.of(first, row) for row in found[0]} & {self.of(second, row) for row in found[1]}
        return (
            [row for row in found[0] if self.of(first, row) in both],
            [row for row in found[1] if self.of(second, row) in both],
        )


class Twins:
    """Rows of files, compared by keys and places."""

    def __init__(self, surveys: Mapping[str, Survey], spans: Spans | None) -> None:
        self.surveys = surveys
        self.spans = spans
        self.contents = Keys({name: one.contents_N2 for name, one in surveys.items()})

    def pairs(self, files: tuple[str, str], keys: Keys) -> list[tuple[int, int]]:
        """Rows of the second file that are in the first too, each with such a row of the first."""
        return [(twin, row) for twin, row in self._across(files, keys, ENOUGH) if twin is not None]

    def alike(self, files: tuple[str, str], keys: Keys) -> dict[int, int]:
        """Rows of the second file in which something changes, but too little to call them the same window as a row of
        the first, which is the value.
        """
        second = files[1]
        keys = keys.without(second, self.surveys[second].changes_N >= ENOUGH)
        if not keys.used(second).any():
            return {}
        same = {row for _, row in self.pairs(files, keys)}
        return {row: twin for twin, row in self._across(files, keys, 1) if twin is not None and row not in same}

    def moved(self, files: tuple[str, str]) -> list[tuple[int, int]]:
        """Rows of the second file that are, but for their place, in the first, and in which much changes."""
        first, second = files
        keys = self.contents
        alone = [row for twin, row in self._across(files, keys, ENOUGH) if twin is None]
        if not alone:
            return []
        at = {keys.of(first, row): row for row in keys.common(first, second)[0]}
        return [(at[keys.of(second, row)], row) for row in alone if self.changes((second, row)) >= MUCH]

    def repeated(self) -> Iterator[tuple[Row, Row]]:
        """Each row whose window an earlier row of any file holds, after that one."""
        halves = self.contents.halves
        values, counts = np.unique(np.concatenate([keys[:, 0] for keys in halves.values()]), return_counts=True)
        twice = values[counts > 1]  # by half of the key; the whole decides below
        earlier = _Earlier(self, ENOUGH)
        for name, keys in halves.items():
            for row in np.flatnonzero(np.isin(keys[:, 0], twice)).tolist():
                key = self.contents.of(name, row)
                twin = earlier.find(key, (name, row))
                if twin is None:
                    earlier.add(key, (name, row))
                else:
                    yield twin, (name, row)

    def _across(self, files: tuple[str, str], keys: Keys, enough: int) -> Iterator[tuple[int | None, int]]:
        """Rows of the second file whose key stands in the first, each after a row that is the same window, or None.

        Windows with fewer changes than `enough` are the same at one place and of one symbol only.
        """
        first, second = files
        earlier = _Earlier(self, enough)
        own, others = keys.common(first, second)
        for row in own:
            earlier.add(keys.of(first, row), (first, row))
        for row in others:
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
        return self.surveys[row[0]].places.symbol(row[1])


class _Earlier:
    """Rows by key, and by their place."""

    def __init__(self, twins: Twins, enough: int) -> None:
        self._twins = twins
        self._enough = enough
        self._at: dict[tuple[bytes, Span, str], Row] = {}
        self._changing_at: dict[tuple[bytes, Span], Row] = {}
        self._unplaced: dict[bytes, Row] = {}
        self._changing: dict[bytes, Row] = {}
        self._busy: dict[bytes, list[tuple[Span, Row]]] = {}

    def add(self, key: bytes, row: Row) -> None:
        span, changes = self._twins.span(row), self._twins.changes(row)
        if span:
            self._at.setdefault((key, span, self._twins.symbol(row)), row)
        if changes < self._enough:
            return
        self._changing.setdefault(key, row)
        if not span:
            self._unplaced.setdefault(key, row)
        else:
            self._changing_at.setdefault((key, span), row)
            if changes >= MUCH:
                self._busy.setdefault(key, []).append((span, row))

    def find(self, key: bytes, row: Row) -> Row | None:
        """A row that is the same window."""
        span, changes = self._twins.span(row), self._twins.changes(row)
        if span and (twin := self._at.get((key, span, self._twins.symbol(row)))):
            return twin
        if changes < self._enough:
            return None
        if not span:
            return self._changing.get(key)
        twin = self._unplaced.get(key) or self._changing_at.get((key, span))
        if twin is None and changes >= MUCH:
            twin = next((other for at, other in self._busy.get(key, ()) if at[0] <= span[1] and span[0] <= at[1]), None)
        return twin
