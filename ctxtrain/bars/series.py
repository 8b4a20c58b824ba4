"""Files of bars → one series per symbol, oldest first, without duplicates.

Input: paths and `ReadOptions`. Output: a `Market`: the series of each symbol, the length of a bar, and for the data
card what was detected in each file, and counts. Times are the opens of the bars in UTC, so that the same market has the
same series in every format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctxtrain.bars.clock import market_orders
from ctxtrain.bars.file_bars import FileBars, ReadOptions, read_file
from ctxtrain.bars.same_market import require_distinct_symbols, require_one_volume, tell_similar_files
from ctxtrain.data.outliers import REL_TOL
from ctxtrain.data.row_schema import PRICES
from ctxtrain.data.time_units import SECOND, format_utc
from ctxtrain.errors import MAX_FAULTS_SHOWN, ConfigError, DataError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_OFF_GRID = 0.1  # of a bar length
# Units of inclusive closes, and the grid of the opens after them, in nanoseconds.
_INCLUSIVE = ((1, SECOND), (1_000, SECOND), (1_000_000, SECOND), (SECOND, 60 * SECOND))
_LENGTHS = (("W", 7 * 86_400), ("D", 86_400), ("H", 3600), ("M", 60), ("S", 1))


@dataclass(frozen=True)
class Series:
    """The bars of one symbol. `opens_T` are the times of their opens in UTC nanoseconds, which increase."""

    symbol: str
    opens_T: Ints
    columns: dict[str, Floats]
    words: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.opens_T)


@dataclass(frozen=True)
class Market:
    """All series, the nanoseconds of a bar, and facts for the data card."""

    series: list[Series]
    bar_length: int
    sources: list[dict[str, Any]]
    notes: list[str]
    counts: dict[str, int]

    @property
    def timeframe(self) -> str:
        """The length of a bar, as in M1, M5, H1 or D1; below whole seconds in milliseconds, as in MS250."""
        seconds, rest = divmod(self.bar_length, SECOND)
        if rest:
            return f"MS{self.bar_length * 1000 / SECOND:g}"
        letter, unit = next((letter, unit) for letter, unit in _LENGTHS if seconds % unit == 0)
        return f"{letter}{seconds // unit}"


@dataclass(frozen=True)
class _Origin:
    """Where the bars of a series come from: the file of each, and its place there."""

    files: Sequence[FileBars]
    file_T: Ints
    bar_T: Ints

    def place(self, bar: int) -> str:
        return self.files[int(self.file_T[bar])].place(int(self.bar_T[bar]))


def read_market(paths: Sequence[Path], options: ReadOptions) -> Market:
    """Read all files. Raises DataError with the faults of every file."""
    files, faults = [], list[str]()
    for path in paths:
        try:
            files.append(read_file(path, options))
        except DataError as error:
            faults += error.faults
    if faults:
        raise DataError(faults)
    require_distinct_symbols(files)
    require_one_volume(files)
    similar = tell_similar_files(files)
    length, told_length = _bar_length(files, options.bar_length)
    names, told_names = _common_columns(files)
    counts = Counter[str](bars=0, duplicates=0, rounded=0, rows_without_prices=sum(file.empty for file in files))
    symbols = np.unique(np.concatenate([np.unique(file.symbols_T) for file in files])).tolist()
    series = [_join(files, symbol, names, length, counts) for symbol in symbols]
    _count_gaps(series, length, counts)
    sources = [
        {"path": str(file.source.path), "sha256": file.source.sha256, "bars": len(file.rows_T), "notes": file.notes}
        for file in files
    ]
    for source, file in zip(sources, files, strict=True):
        source["unread_columns"] = file.unread
    return Market(
        series, length, sources, [*_tell_files(files, length), *similar, *told_names, told_length], dict(counts)
    )


def _bar_length(files: Sequence[FileBars], given: int | None) -> tuple[int, str]:
    """Nanoseconds of a bar: the most common step of a file, equal in all files."""
    if given:
        for file in files:
            _require_length(file, given)
        return given, f"bars: {_name_length(given)}, from --bar-length"
    modes: dict[int, FileBars] = {}
    for file in files:
        lengths, counts = np.unique(_steps(file), return_counts=True)
        if len(lengths):
            modes.setdefault(int(lengths[counts.argmax()]), file)
    if not modes:
        raise DataError(f"{files[0].source.path}: one bar has no length. Give it with --bar-length, such as 5m.")
    if len(modes) > 1:
        found = ", ".join(f"{_name_length(length)} in {file.source.path}" for length, file in modes.items())
        raise DataError(f"all files must have bars of one length, got {found}. Make windows of each on its own.")
    (length,) = modes
    return length, f"bars: {_name_length(length)}, the most common step"


def _steps(file: FileBars) -> Ints:
    """The steps between the bars of each symbol, without those of 0."""
    orders = market_orders(file.symbols_T, file.bar_times.stamps_T)
    steps = np.concatenate([np.diff(np.sort(file.bar_times.stamps_T[bars])) for bars, _ in orders])
    return steps[steps > 0]


def _require_length(file: FileBars, length: int) -> None:
    """Raise ConfigError if most steps are no whole number of bars of `length`; daylight saving may shift some."""
    steps = _steps(file)
    off = np.abs(steps - np.rint(steps / length) * length) > _OFF_GRID * length
    wrong = (steps < (1 - _OFF_GRID) * length) | off
    if len(steps) and wrong.mean() > 0.5:
        lengths, counts = np.unique(steps, return_counts=True)
        usual = _name_length(int(lengths[counts.argmax()]))
        rule = f"bar-length must fit the steps between bars, got {_name_length(length)}, but most steps are {usual}"
        raise ConfigError(f"{file.source.path}: {rule}. Leave --bar-length out.")


def _name_length(length: int) -> str:
    seconds = length / SECOND
    for word, unit in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        if seconds % unit == 0:
            return f"{seconds / unit:g} {word}{'s' if seconds != unit else ''}"
    return f"{seconds:g} seconds"


def _common_columns(files: Sequence[FileBars]) -> tuple[set[str], list[str]]:
    """The columns that all files have, and notes about the others."""
    every = [{*file.columns, *file.words} for file in files]
    common = set.intersection(*every)
    for name in sorted(common):
        if len({name in file.words for file in files}) > 1:
            raise DataError(f"{name} must be numbers in all files or in none. Make windows of each on its own.")
    partial = sorted(set.union(*every) - common)
    return common, [f"left out, because some files lack them: {', '.join(partial)}"] if partial else []


def _join(files: Sequence[FileBars], symbol: str, names: set[str], length: int, counts: Counter[str]) -> Series:
    """The bars of one symbol from all files: sorted, checked, and without duplicates."""
    parts = []
    for number, file in enumerate(files):
        bars = np.flatnonzero(file.symbols_T == symbol)
        stamps = file.bar_times.stamps_T[bars]
        if file.bar_times.stamp == "close":
            stamps = stamps + last_instant(file.bar_times.stamps_T, length) - length
        parts.append((number, bars, stamps))
    opens = np.concatenate([stamps for _, _, stamps in parts])
    order = np.argsort(opens, kind="stable")
    origin = _Origin(
        files,
        np.concatenate([np.full(len(bars), number) for number, bars, _ in parts])[order],
        np.concatenate([bars for _, bars, _ in parts])[order],
    )
    columns = {
        name: np.concatenate([files[number].columns[name][bars] for number, bars, _ in parts])[order]
        for name in files[0].columns
        if name in names
    }
    words = {
        name: [value for number, bars, _ in parts for value in _pick(files[number].words[name], bars)]
        for name in files[0].words
        if name in names
    }
    words = {name: _pick(values, order) for name, values in words.items()}
    kept = _distinct(opens[order], columns, words, origin, symbol)
    counts["bars"] += len(kept)
    counts["duplicates"] += len(order) - len(kept)
    columns = {name: values[kept] for name, values in columns.items()}
    origin = _Origin(files, origin.file_T[kept], origin.bar_T[kept])
    counts["rounded"] += _check_prices(columns, origin)
    if "volume" in columns:
        lacking = np.flatnonzero(np.isnan(columns["volume"]))
        counts["bars_without_volume"] += len(lacking)
        counts["bars_with_zero_volume"] += int((columns["volume"] == 0).sum())
    return Series(symbol, opens[order][kept], columns, {name: _pick(values, kept) for name, values in words.items()})


def last_instant(stamps_T: Ints, length: int) -> int:
    """What inclusive closes such as 09:34:59.999 lack to the next open: 1 unit of their times, 0 for other closes."""
    for unit, grid in _INCLUSIVE:
        if length % grid == 0 and ((stamps_T + unit) % grid == 0).all():
            return unit
    return 0


def _pick(values: Sequence[Any], places: Ints) -> list[Any]:
    return [values[place] for place in places.tolist()]


def _distinct(
    opens_T: Ints, columns: dict[str, Floats], words: dict[str, list[Any]], origin: _Origin, symbol: str
) -> Ints:
    """The first bar of each time. Raises DataError if bars of one time differ in any value that is read."""
    same = np.concatenate(([False], opens_T[1:] == opens_T[:-1]))
    repeats = np.flatnonzero(same)
    other = {
        name: ~((values[repeats] == values[repeats - 1]) | (np.isnan(values[repeats]) & np.isnan(values[repeats - 1])))
        for name, values in columns.items()
    }
    other |= {
        name: np.array([values[bar] != values[bar - 1] for bar in repeats.tolist()], np.bool_)
        for name, values in words.items()
    }
    different = [
        (int(bar), ", ".join(name for name in other if other[name][n]))
        for n, bar in enumerate(repeats.tolist())
        if any(differs[n] for differs in other.values())
    ]
    if different:
        naive = any(origin.files[int(origin.file_T[bar])].bar_times.is_naive for bar, _ in different)
        hint = " Or give the zone of the times with --time-zone, if daylight saving repeats an hour." if naive else ""
        raise DataError(
            [
                f"{origin.place(bar)}: {symbol} must have one bar at {format_utc(int(opens_T[bar]))}, but "
                f"{origin.place(bar - 1)} has other values of {names}. Delete one of them.{hint}"
                for bar, names in different[:MAX_FAULTS_SHOWN]
            ],
            total=len(different),
        )
    return np.flatnonzero(~same)


def _check_prices(columns: dict[str, Floats], origin: _Origin) -> int:
    """Correct high and low that are off by rounding, in place; returns their number. Raises DataError for others."""
    opened, high, low, close = (columns[name] for name in PRICES)
    top, bottom = np.maximum.reduce([opened, high, low, close]), np.minimum.reduce([opened, high, low, close])
    tolerance = REL_TOL * np.maximum(np.abs(top), np.abs(bottom))
    wrong = np.flatnonzero((top - high > tolerance) | (low - bottom > tolerance))
    if len(wrong):
        remedy = "Correct or delete the bar, or name the columns with --columns open=…,high=…,low=…,close=…"
        raise DataError(
            [
                f"{origin.place(bar)}: a bar must have low ≤ open, close ≤ high, got open {opened[bar]:g}, "
                f"high {high[bar]:g}, low {low[bar]:g}, close {close[bar]:g}. {remedy}."
                for bar in wrong[:MAX_FAULTS_SHOWN].tolist()
            ],
            total=len(wrong),
        )
    rounded = int(((top != high) | (bottom != low)).sum())
    high[:], low[:] = top, bottom
    return rounded


def _count_gaps(series: Sequence[Series], length: int, counts: Counter[str]) -> None:
    """Places without bars, the bars that would fit there, and bars that are not a whole number of lengths apart."""
    for one in series:
        missing = missing_bars(one.opens_T, length)
        counts["gaps"] += int((missing > 0).sum())
        counts["bars_missing_in_gaps"] += int(missing.sum())
        counts["longest_gap_in_bars"] = max(counts["longest_gap_in_bars"], int(missing.max(initial=0)))
        counts["bars_off_the_grid"] += int((np.diff(one.opens_T) % length != 0).sum())


def missing_bars(opens_T: Ints, length: int) -> Ints:
    """The bars missing between each bar and the next; a step of 25 hours between days lacks none."""
    return np.maximum(np.rint(np.diff(opens_T) / length).astype(np.int64) - 1, 0)


def _tell_files(files: Sequence[FileBars], length: int) -> list[str]:
    """What was detected in the files, one line each; what is equal for several files once."""
    lines: dict[str, list[str]] = {}
    for file in files:
        inclusive = file.bar_times.stamp == "close" and last_instant(file.bar_times.stamps_T, length)
        closes = ["closes are the last instant of their bars; opens are the next whole second"] if inclusive else []
        unread = [f"columns not read: {', '.join(file.unread)}"] if file.unread else []
        empty = [f"rows without prices, left out: {file.empty:,}"] if file.empty else []
        for text in (*file.notes, *closes, *unread, *empty):
            lines.setdefault(text, []).append(str(file.source.path))
    return [f"{places[0] if len(places) == 1 else f'{len(places):,} files'}: {text}" for text, places in lines.items()]
