"""Decoded rows → windows, and the report of one pass over them.

Input: rows with their numbers, as plain values, from any source. Output: a `Window` per valid row, as an iterator, and
a `ParseReport` with `place: reason` per fault. One pass finds all faults and holds only the current window in memory.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ctxtrain.data.notices import Notices
from ctxtrain.data.parse_window import Kind, Window, parse_row
from ctxtrain.data.row_schema import NO_FIELDS, OwnFields, names_prices
from ctxtrain.errors import MAX_FAULTS_SHOWN, DataError

MAX_ROWS_PER_KIND = 10  # of faults that are alike: with one in every row, no other would be seen
MAX_KINDS = 1_000
IN_FILE, IN_MEMORY = ":row ", " row "  # separators of rows without lines
_ROWS_OF_KIND: dict[Kind, str] = {
    "window": "window rows (context_bars)",
    "features": "rows of features without bars",
    "text": "text rows (context)",
}
_FEATURE = re.compile(r"^features\.\S+")
_BAR = re.compile(r"\b(context_bars\[\d+\]|current_bar)")


def _without_bar(reason: str) -> str:
    """A reason without the bar and the value: equal for the bars of a row with one fault."""
    return _BAR.sub("a bar", reason).partition(", got ")[0]


@dataclass
class ParseReport:
    """Result of one pass over the rows of a source: `rows` = `good` windows + rows with faults.

    `source` names the file, or the rows in memory. `separator` stands between that name and the number of a row:
    `file:7` is a line, `file:row 7` a row of a file without lines, `train row 7` a row in memory.
    """

    source: str
    separator: str = ":"
    rows: int = 0
    good: int = 0
    faults: list[str] = field(default_factory=list)
    fault_total: int = 0
    hidden: Counter[str] = field(default_factory=Counter)  # faults by kind that are not among `faults`
    _kinds: Counter[str] = field(default_factory=Counter)
    ignored_fields: Counter[str] = field(default_factory=Counter)
    sha256: str = ""  # of the file as stored, compressed or not, or of the rows in memory
    notices: Notices = field(default_factory=Notices)

    @property
    def prefix(self) -> str:
        """What precedes the number of a row in its place."""
        return f"{self.source}{self.separator}" if self.source else self.separator.lstrip()

    def add_faults(self, place: str, reasons: Sequence[str]) -> None:
        """Add the faults of a row. Of each kind the first rows are listed, and the others counted."""
        of_row: dict[str, list[str]] = {}
        for reason in reasons:
            of_row.setdefault(_without_bar(reason), []).append(reason)
        for name, bars in of_row.items():
            kind = _FEATURE.sub("a feature", name)
            if kind not in self._kinds and len(self._kinds) >= MAX_KINDS:
                kind = "other faults"
            self.fault_total += 1
            self._kinds[kind] += 1
            if self._kinds[kind] <= MAX_ROWS_PER_KIND and len(self.faults) < MAX_FAULTS_SHOWN:
                others = len(bars) - 1
                more = f" (and {others} more bar{'' if others == 1 else 's'} of the row)" if others else ""
                self.faults.append(f"{place}: {bars[0]}{more}")
            else:
                self.hidden[kind] += 1

    def refuse_faults(self) -> None:
        """Raise DataError if there are faults."""
        if self.faults:
            raise DataError(self.faults, total=self.fault_total, hidden=self.hidden)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that are stored beside the cached table of a file without faults."""
        return {
            "separator": self.separator,
            "rows": self.rows,
            "good": self.good,
            "ignored_fields": dict(self.ignored_fields),
            "noticed": self.notices.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str, sha256: str) -> ParseReport:
        """Inverse of `to_dict`. Raises KeyError or TypeError for other values."""
        ignored, notices = Counter(values["ignored_fields"]), Notices.from_dict(values["noticed"])
        return cls(
            source,
            values["separator"],
            values["rows"],
            values["good"],
            ignored_fields=ignored,
            sha256=sha256,
            notices=notices,
        )


@dataclass(frozen=True)
class Unreadable:
    """In place of a row that could not be decoded: the reason, and where.

    `place` replaces the place of the row in the message: `12:40` is line 12, column 40 of the file. Nothing is read
    after a row that `ends` the pass.
    """

    reason: str
    place: str = ""
    ends: bool = False


NumberedRow = tuple[int, object]  # the number of a line or row, from 1, and a decoded row or an `Unreadable`
_ROW_PARTS = frozenset({"context_bars", "current_bar", "context", "features"})
BARS_REMEDY = "Make windows of its bars with `ctxtrain windows` (docs/own-windows.md)"


def is_bar(row: Mapping[str, object]) -> bool:
    """Whether an object is one bar, and no row: it has prices and no part of a row."""
    return names_prices(row) and not row.keys() & _ROW_PARTS


def parse_rows(
    rows: Iterable[NumberedRow], report: ParseReport, *, labelled: bool, own: OwnFields = NO_FIELDS
) -> Iterator[Window]:
    """Yield the windows of valid rows; `report` collects every row's faults and notices."""
    first_of_kind: dict[Kind, str] = {}  # location of the first row of each kind
    for number, row in rows:
        report.rows += 1
        place = f"{report.prefix}{number}"
        if isinstance(row, Unreadable):
            report.add_faults(f"{report.source}:{row.place}" if row.place else place, [row.reason])
            if row.ends:
                break
            continue
        if report.rows == 1 and isinstance(row, Mapping) and is_bar(row):
            report.add_faults(place, [f"a row must be a window of bars, but this is one bar. {BARS_REMEDY}."])
            break  # every row would have this fault
        window, reasons = parse_row(row, place, labelled=labelled, own=own)
        report.add_faults(place, reasons)
        if window:
            report.good += 1
            report.ignored_fields.update(window.unread)
            report.notices.add(window)
            first_of_kind.setdefault(window.kind, place)
            yield window
    if not report.rows:
        what = "there are no rows" if report.separator == IN_MEMORY else "the file has no rows"
        report.add_faults(report.source or "rows", [f"{what}; at least one is required"])
    if len(first_of_kind) > 1:
        mixed = " and ".join(_ROWS_OF_KIND[kind] for kind in first_of_kind)
        report.add_faults(list(first_of_kind.values())[1], [f"mixes {mixed}; a file must have one kind of row"])
    if labelled:
        for fault in report.notices.file_faults():
            report.add_faults(*fault)
