"""Notices about the valid rows of a file: what was dropped, assumed or corrected.

Input: windows, one by one. Output: counts, and one message per kind of notice and file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ctxtrain.data.parse_window import Window
from ctxtrain.data.time_units import PLAIN_NUMBER


@dataclass
class Notices:
    """Counts of what was noticed in the rows of one file.

    `lacking` has, by field, the number of rows in which some bars lack it, and the number of those bars. `units` has
    the location of the first row with each unit. `numbers` and `words` have, by feature, the location of the first row
    in which it is a number or a word; `word_rows` counts the rows in which it is a word.
    """

    rows: int = 0
    blank_lines: int = 0
    lacking: dict[str, tuple[int, int]] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    time_names: Counter[str] = field(default_factory=Counter)
    rejected_names: Counter[str] = field(default_factory=Counter)
    without_order: int = 0
    without_symbol: int = 0
    rounded_rows: int = 0
    rounded_bars: int = 0
    empty_rows: int = 0
    empty_bars: int = 0
    changes: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    numbers: dict[str, str] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)
    word_rows: Counter[str] = field(default_factory=Counter)
    conversions: list[str] = field(default_factory=list)  # messages about values of the format, such as NaN

    def add(self, window: Window) -> None:
        self.rows += 1
        self.changes.update(window.changes)
        for name in window.features:
            self.numbers.setdefault(name, window.location)
        for name in window.feature_words:
            self.words.setdefault(name, window.location)
            self.word_rows[name] += 1
        if window.text is not None:
            return
        for name, bars in window.lacking.items():
            rows_so_far, bars_so_far = self.lacking.get(name, (0, 0))
            self.lacking[name] = (rows_so_far + 1, bars_so_far + bars)
        position = window.position
        if position.unit:
            self.units.setdefault(position.unit, window.location)
            self.time_names[position.time_name] += 1
        if position.rejected_time_name:
            self.rejected_names[position.rejected_time_name] += 1
        self.without_symbol += window.symbol is None
        if not window.bars:
            if window.position.rejected_time_name:
                self.rejected_names[window.position.rejected_time_name] += 1
            return
        self.without_order += not position.unit and position.index is None and "bar_index" not in position.lacking
        self.rounded_rows += window.rounded > 0
        self.rounded_bars += window.rounded
        empty = _empty_bars(window)
        self.empty_rows += empty > 0
        self.empty_bars += empty

    def to_dict(self) -> dict[str, Any]:
        """The counts as plain values, without locations of rows."""
        values = {**vars(self), "units": list(self.units), "numbers": {}, "words": {}}
        values["untimely"] = values.pop("rejected_names")  # key in existing caches
        values["changes"] = [[*change, rows] for change, rows in self.changes.items()]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Notices:
        """Inverse of `to_dict`. Raises KeyError or TypeError for other values."""
        fields = dict(values)
        fields["rejected_names"] = Counter(fields.pop("untimely"))
        fields["lacking"] = {name: (rows, bars) for name, (rows, bars) in values["lacking"].items()}
        fields["units"] = dict.fromkeys(values["units"], "")
        fields["time_names"] = Counter(values["time_names"])
        fields["word_rows"] = Counter(values["word_rows"])
        fields["changes"] = Counter({(kind, found, name): rows for kind, found, name, rows in values["changes"]})
        return cls(**fields)

    def file_faults(self) -> Iterator[tuple[str, list[str]]]:
        """Location and messages of each fault that only several rows together have."""
        if len(self.units) > 1:
            (unit, place), (other, second) = list(self.units.items())[:2]
            units = f"here they are {other}, and {unit} at {place}"
            yield second, [f"the times of a file must have one unit, but {units}. Write all times in one unit."]
        for name in self.numbers.keys() & self.words.keys():
            rule = f"features.{name} must be a number in all rows of a file, or a word in all of them"
            yield self.words[name], [f"{rule}, but here it is a word, and a number at {self.numbers[name]}"]

    def incomplete(self) -> dict[str, dict[str, int]]:
        """By field: the number of rows in which some bars lack it, and the number of those bars."""
        return {name: {"rows": rows, "bars": bars} for name, (rows, bars) in sorted(self.lacking.items())}

    def time_unit(self) -> str | None:
        return next(iter(self.units), None)

    def lines(self) -> Iterator[str]:
        """One message per kind of notice."""
        yield from self.conversions
        yield from self._change_lines()
        yield from self._field_lines()
        for name, rows in sorted(self.word_rows.items()):
            yield f"features.{name} is a word in {_of_rows(rows, self.rows)}, and is read as a category"
        for name, rows in self.time_names.items():
            if name != "time":
                yield f"{_of_rows(rows, self.rows)} have no time; {name} is used as the time of their bars"
        for name, rows in self.rejected_names.items():
            yield (
                f"{name} is not used as the time of bars in {_of_rows(rows, self.rows)}: it must be a different "
                "ISO 8601 text or number on each bar, and numbers that are no dates must only rise or only fall"
            )
        if self.time_unit() == PLAIN_NUMBER:
            yield (
                "times are plain numbers below 100,000,000, of unknown unit: they give no dates, and are comparable "
                "only with such numbers in other files"
            )
        if self.without_order:
            yield (
                f"{_of_rows(self.without_order, self.rows)} have neither time nor bar_index, so their bars are assumed "
                "to be oldest first"
            )
        if self.rounded_rows:
            where = f"{_count(self.rounded_bars, 'bar')} in {_of_rows(self.rounded_rows, self.rows)}"
            kinds = "half of its last decimal, or float32"
            yield f"high or low had a rounding error ({kinds}) on {where} and was corrected"
        if self.empty_rows:
            yield (
                f"all prices and the volume are 0 on {_count(self.empty_bars, 'bar')} in "
                f"{_of_rows(self.empty_rows, self.rows)}, but not on all bars: for a bar without trades, repeat the "
                "previous close as its prices, or omit the bar"
            )
        if 0 < self.without_symbol < self.rows:
            yield (
                f"{_of_rows(self.without_symbol, self.rows)} have no symbol and are treated as a separate market: bars "
                "that they share with other rows are not detected"
            )
        if self.blank_lines:
            yield f"{_count(self.blank_lines, 'blank line')} ignored"

    def _change_lines(self) -> Iterator[str]:
        """One message for each kind of spelling that is not the documented one, with the largest number of rows."""
        kinds: dict[str, list[tuple[str, str]]] = {}
        rows: Counter[str] = Counter()
        for (kind, found, name), count in sorted(self.changes.items()):
            kinds.setdefault(kind, []).append((found, name))
            rows[kind] = max(rows[kind], count)
        for kind, pairs in kinds.items():
            fields, of = ", ".join(found for found, _ in pairs), _of_rows(rows[kind], self.rows)
            if kind == "name":
                yield f"{fields} in bars are read as {', '.join(name for _, name in pairs)} (up to {of})"
            elif kind == "id":
                yield f"event_id is read as the id ({of})"
            elif kind == "object":
                yield f"an object is read as true and null as false in {fields} (up to {of})"
            elif kind == "flag":
                yield f"true and false are read as 1 and 0 in the features {fields} (up to {of})"
            else:
                what = "text is read as numbers" if kind == "text" else "numbers with a decimal point are read as whole"
                yield f"{what} in {fields} (up to {of})"

    def _field_lines(self) -> Iterator[str]:
        for name, (rows, bars) in sorted(self.lacking.items()):
            where = f"{_count(bars, 'bar')} in {_of_rows(rows, self.rows)}"
            if name.startswith("features."):
                yield f"{name} is null in {_of_rows(rows, self.rows)}, and treated as missing there"
            elif name in ("bar_index", *self.time_names):
                yield f"{name} is missing on {where}; a row whose first or last bar lacks it has no position by it"
            else:
                yield (
                    f"{name} is missing on {where}, and is dropped from these rows: the model reads only "
                    "fields that every bar of every row has. Fill it in, or omit these bars"
                )


def _empty_bars(window: Window) -> int:
    """Number of bars with zero prices and volume, in a window where other bars have values."""
    bars = window.bars
    is_empty = (bars["high"] == 0) & (bars["low"] == 0) & (bars.get("volume", 0) == 0)
    return 0 if is_empty.all() else int(is_empty.sum())


def time_unit_message(units: Mapping[str, str | None]) -> str | None:
    """The units of the times of all files, with the file names, or None."""
    files: dict[str, list[str]] = {}
    for name, unit in units.items():
        if unit:
            files.setdefault(unit, []).append(name)
    parts = [f"{unit} in {' and '.join(filter(None, [', '.join(n[:-1]), n[-1]]))}" for unit, n in files.items()]
    return f"times are read as {'; '.join(parts)}" if parts else None


def _of_rows(count: int, of: int) -> str:
    return f"{count:,} of {of:,} rows"


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
