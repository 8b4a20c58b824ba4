"""Which rows are the same window, and which only look alike.

Comes in: the `Survey` of each file, keys that equal rows share, and where windows lie. Goes out: pairs of rows.

Rows of one key are the same window if they stand at the same place, or if one does not say where it stands. A quiet
market looks alike for hours, and pegged ones look alike at one moment. So a window in which little changes is the same
as another only if both say so: of one symbol, at one place. Without that it is a look-alike, which is told and not
refused. Windows in which much changes cannot be equal by chance, so they need only overlap.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ctxtrain.data.positions import Spans
from ctxtrain.data.profile import Survey

ANOTHER_TIME = "same bars at another time"
LOOK_ALIKE = "quiet windows alike"
# Bars that differ from the bar before: one tick there and back again are two, and two such ticks four.
ENOUGH, MUCH = 5, 10
Row = tuple[str, int]
Keys = Mapping[str, Sequence[bytes | None]]
Span = tuple[int, int]


class Twins:
    """Rows of files, compared by keys and places."""

    def __init__(self, surveys: Mapping[str, Survey], spans: Spans | None) -> None:
        self.surveys = surveys
        self.spans = spans

    def pairs(self, files: tuple[str, str], keys: Keys) -> list[tuple[int, int]]:
        """Rows of the second file that are in the first too, each with such a row of the first."""
        return [(twin, row) for twin, row in self._across(files, keys, ENOUGH) if twin is not None]

    def alike(self, files: tuple[str, str], keys: Keys) -> dict[int, int]:
        """Rows of the second file in which something changes, but too little to call them the same window as a row of
        the first, which is the value.
        """
        first, second = files
        quiet = [key if self.changes((second, row)) < ENOUGH else None for row, key in enumerate(keys[second])]
        if not any(quiet):
            return {}
        keys = {first: keys[first], second: quiet}
        same = {row for _, row in self.pairs(files, keys)}
        return {row: twin for twin, row in self._across(files, keys, 1) if twin is not None and row not in same}

    def moved(self, files: tuple[str, str], keys: Keys) -> list[tuple[int, int]]:
        """Rows of the second file that are, but for their place, in the first, and in which much changes."""
        first, second = files
        alone = [row for twin, row in self._across(files, keys, ENOUGH) if twin is None]
        at = {key: row for row, key in enumerate(keys[first]) if key is not None}
        return [(at[key], row) for row in alone if (key := keys[second][row]) and self.changes((second, row)) >= MUCH]

    def repeated(self) -> Iterator[tuple[Row, Row]]:
        """Each row whose window an earlier row of any file holds, after that one."""
        contents = {name: one.contents for name, one in self.surveys.items()}
        once: set[bytes] = set()
        twice: set[bytes] = set()
        for keys in contents.values():
            for key in keys:
                (twice if key in once else once).add(key)
        del once
        earlier = _Earlier(self, ENOUGH)
        for name, keys in contents.items():
            for row, key in enumerate(keys):
                if key in twice:
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
        both = set(keys[first]) & set(keys[second]) - {None}
        if not both:
            return
        earlier = _Earlier(self, enough)
        for row, key in enumerate(keys[first]):
            if key is not None and key in both:
                earlier.add(key, (first, row))
        for row, key in enumerate(keys[second]):
            if key is not None and key in both:
                twin = earlier.find(key, (second, row))
                yield (twin[1] if twin else None), row

    def span(self, row: Row) -> Span | None:
        name, n = row
        if self.spans is None or not self.spans.placed_N[name][n]:
            return None
        return int(self.spans.first_N[name][n]), int(self.spans.last_N[name][n])

    def changes(self, row: Row) -> int:
        return self.surveys[row[0]].changes[row[1]]

    def symbol(self, row: Row) -> str:
        return self.surveys[row[0]].places.symbols[row[1]]


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
