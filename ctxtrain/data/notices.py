"""What was noticed about the good rows of a file: what was dropped, guessed or put right.

Comes in: windows, one by one. Goes out: counts, and a line for people on each thing, once a file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ctxtrain.data.parse_window import Window
from ctxtrain.data.time_units import NUMBER


@dataclass
class Noticed:
    """`lacking` has, by field, the rows in which some bars lack it, and those bars; `units` the first row of each."""

    rows: int = 0
    blank_lines: int = 0
    lacking: dict[str, tuple[int, int]] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    time_names: Counter[str] = field(default_factory=Counter)
    untimely: Counter[str] = field(default_factory=Counter)
    without_order: int = 0
    without_symbol: int = 0
    rounded_rows: int = 0
    rounded_bars: int = 0
    empty_rows: int = 0
    empty_bars: int = 0

    def see(self, window: Window) -> None:
        self.rows += 1
        if window.text is not None:
            return
        for name, bars in window.lacking.items():
            rows_so_far, bars_so_far = self.lacking.get(name, (0, 0))
            self.lacking[name] = (rows_so_far + 1, bars_so_far + bars)
        placed = window.placed
        if placed.unit:
            self.units.setdefault(placed.unit, window.place)
            self.time_names[placed.time_name] += 1
        if placed.untimely:
            self.untimely[placed.untimely] += 1
        self.without_order += not placed.unit and placed.index is None and "bar_index" not in placed.lacking
        self.without_symbol += window.symbol is None
        self.rounded_rows += window.rounded > 0
        self.rounded_bars += window.rounded
        empty = _empty_bars(window)
        self.empty_rows += empty > 0
        self.empty_bars += empty

    def to_keep(self) -> dict[str, Any]:
        """The counts as plain values, without the places of rows."""
        return {**vars(self), "units": list(self.units)}

    @classmethod
    def kept(cls, found: Mapping[str, Any]) -> Noticed:
        """The inverse of `to_keep`. Raises KeyError or TypeError for anything else."""
        return cls(
            **dict(found)
            | {
                "lacking": {name: (rows, bars) for name, (rows, bars) in found["lacking"].items()},
                "units": dict.fromkeys(found["units"], ""),
                "time_names": Counter(found["time_names"]),
                "untimely": Counter(found["untimely"]),
            }
        )

    def unit_fault(self) -> tuple[str, list[str]] | None:
        """The place and the words, where the times of a file have two units."""
        if len(self.units) < 2:
            return None
        (unit, place), (other, second) = list(self.units.items())[:2]
        found = f"here they are {other}, and {unit} at {place}"
        return second, [f"the times of a file must have one unit, but {found}. Write all of them in one."]

    def incomplete(self) -> dict[str, dict[str, int]]:
        """By field: in how many rows some bars lack it, and how many bars."""
        return {name: {"rows": rows, "bars": bars} for name, (rows, bars) in sorted(self.lacking.items())}

    def time_unit(self) -> str | None:
        return next(iter(self.units), None)

    def lines(self) -> Iterator[str]:
        """What a person should know, each thing once."""
        yield from self._fields()
        for name, rows in self.time_names.items():
            if name != "time":
                yield f"{_rows(rows, self.rows)} have no time, and {name} was taken as the time of their bars"
        for name, rows in self.untimely.items():
            yield (
                f"{name} was not taken as the time of bars in {_rows(rows, self.rows)}: it must be another ISO 8601 "
                "text or number on each bar, and numbers that are no dates must run one way"
            )
        if self.time_unit() == NUMBER:
            yield (
                "times are plain numbers below 100,000,000, of no known unit: there are no dates, and they compare "
                "with those of other such files only"
            )
        if self.without_order:
            yield (
                f"{_rows(self.without_order, self.rows)} say neither time nor bar_index, so the order of their bars "
                "was taken as given, oldest first"
            )
        if self.rounded_rows:
            where = f"{_counted(self.rounded_bars, 'bar')} in {_rows(self.rounded_rows, self.rows)}"
            yield f"high or low was off by rounding (at most one part in 10⁹) on {where}, and was put right"
        if self.empty_rows:
            yield (
                f"all prices and the volume are 0 on {_counted(self.empty_bars, 'bar')} in "
                f"{_rows(self.empty_rows, self.rows)}, beside bars that are not: where a bar has no trade, repeat the "
                "close before as its prices, or leave it out"
            )
        if 0 < self.without_symbol < self.rows:
            yield (
                f"{_rows(self.without_symbol, self.rows)} have no symbol and are taken as a market of their own: bars "
                "that they share with others are not seen"
            )
        if self.blank_lines:
            yield f"{_counted(self.blank_lines, 'blank line')} left out"

    def _fields(self) -> Iterator[str]:
        for name, (rows, bars) in sorted(self.lacking.items()):
            where = f"{_counted(bars, 'bar')} in {_rows(rows, self.rows)}"
            if name.startswith("features."):
                yield f"{name} is null in {_rows(rows, self.rows)}, and counts as not given there"
            elif name in ("bar_index", *self.time_names):
                yield f"{name} is missing on {where}; a row whose first or last bar lacks it has no place by it"
            else:
                yield (
                    f"{name} is missing on {where}, and is dropped from these rows: a model reads what every bar of "
                    "every row has. Fill it in, or leave these bars out"
                )


def _empty_bars(window: Window) -> int:
    """How many bars hold zeros alone, where others do not."""
    bars = window.bars
    is_empty = (bars["high"] == 0) & (bars["low"] == 0) & (bars["volume"] == 0)
    return 0 if is_empty.all() else int(is_empty.sum())


def unit_line(units: Mapping[str, str | None]) -> str | None:
    """In which unit the times of files are, by their names."""
    files: dict[str, list[str]] = {}
    for name, unit in units.items():
        if unit:
            files.setdefault(unit, []).append(name)
    parts = [f"{unit} in {' and '.join(filter(None, [', '.join(n[:-1]), n[-1]]))}" for unit, n in files.items()]
    return f"times are read as {'; '.join(parts)}" if parts else None


def _rows(count: int, of: int) -> str:
    return f"{count:,} of {of:,} rows"


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
