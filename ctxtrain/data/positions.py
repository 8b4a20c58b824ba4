"""Positions of windows on a common scale: time if the files have it, else bar_index if it is reliable.

Input: windows, one by one. Output: `WindowPositions` of a file, as columns on disk, and `Spans` of several files.

A bar_index that restarts (every day, every contract) gives different bars the same number, and would make unrelated
windows overlap. Therefore the prices of one bar in ten are recorded: of the bars whose number, in steps of a bar, is a
multiple of ten. A window of 30 bars has about three of them, even if numbers advance by five or have gaps. If windows
disagree about these prices too often, bar_index is not used. The same holds for times that are plain numbers.

Symbols are compared without case and surrounding blanks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.bar_order import Coordinates, Interval
from ctxtrain.data.columns import DiskColumn
from ctxtrain.data.parse_window import Window
from ctxtrain.data.time_units import PLAIN_NUMBER

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

RECORDED_EVERY = 10  # one bar in ten
MAX_NAMED_SYMBOLS = 3
MAX_CONFLICT_SHARE = 0.05  # of windows; up to this share, conflicting prices are taken as errors in the data
NO_SCALE = "some rows have neither time nor bar_index on every bar"
PRICES = ("open", "high", "low", "close")
_INTERVAL_FIELDS = (("first", "i8"), ("last", "i8"), ("step", "i8"), ("known", "?"))
_WINDOW_FIELDS = [
    ("symbol", "i4"),
    *((f"{scale}.{name}", kind) for scale in ("time", "index") for name, kind in _INTERVAL_FIELDS),
]
_BAR_FIELDS = [("window", "i8"), ("number", "i8"), ("content", "i8")]


@dataclass(frozen=True)
class IntervalColumns:
    """Intervals of all windows of a file on one scale, each of shape (windows,); 0 where `known` is False."""

    first: Ints
    last: Ints
    step: Ints
    known: Bools

    @property
    def share(self) -> float:
        return float(self.known.sum()) / max(1, len(self.known))


@dataclass(frozen=True)
class WindowPositions:
    """Positions of the windows of a file, in file order.

    `symbol_N` indexes `symbols`, which holds comparison keys; `spellings` maps each key to its spellings in the rows,
    oldest first. `bars` holds the recorded bars by bar_index, `clock` those by times that are plain numbers.
    """

    symbol_N: Ints
    symbols: list[str]
    time: IntervalColumns
    index: IntervalColumns
    units: set[str]
    bars: NDArray[Any]
    clock: NDArray[Any]
    spellings: dict[str, list[str]]

    def __len__(self) -> int:
        return len(self.symbol_N)

    def symbol(self, row: int) -> str:
        return self.symbols[int(self.symbol_N[row])]

    @property
    def kind(self) -> str:
        """Kind of times in the file: dates, plain numbers, or "" without times."""
        return "" if not self.units else "plain numbers" if PLAIN_NUMBER in self.units else "dates"


class PositionsBuilder:
    """Collects windows one by one; `build` returns their `WindowPositions`."""

    def __init__(self) -> None:
        self._windows = DiskColumn(_WINDOW_FIELDS)
        self._bars, self._clock = DiskColumn(_BAR_FIELDS), DiskColumn(_BAR_FIELDS)
        self._symbols: dict[str, int] = {}
        self._units: set[str] = set()
        self._spellings: dict[str, list[str]] = {}

    def add(self, window: Window) -> None:
        key = symbol_key(window.symbol)
        symbol = self._symbols.setdefault(key, len(self._symbols))
        if window.symbol and window.symbol not in (spellings := self._spellings.setdefault(key, [])):
            spellings.append(window.symbol)
        position, number = window.position, len(self._windows)
        self._windows.append((symbol, *_interval_entry(position.time), *_interval_entry(position.index)))
        if position.unit:
            self._units.add(position.unit)
        if position.index:
            _record_bars(self._bars, number, window, position.indices, position.index.step)
        if position.time and position.unit == PLAIN_NUMBER:
            _record_bars(self._clock, number, window, position.numeric_times, position.time.step)

    def build(self) -> WindowPositions:
        windows = self._windows.array()
        time, index = (
            IntervalColumns(*(windows[f"{scale}.{name}"] for name in ("first", "last", "step", "known")))
            for scale in ("time", "index")
        )
        return WindowPositions(
            windows["symbol"],
            list(self._symbols),
            time,
            index,
            self._units,
            self._bars.array(),
            self._clock.array(),
            self._spellings,
        )


def collect_positions(windows: Iterable[Window]) -> WindowPositions:
    """The positions of windows in memory."""
    builder = PositionsBuilder()
    for window in windows:
        builder.add(window)
    return builder.build()


def _interval_entry(interval: Interval | None) -> tuple[int, int, int, bool]:
    return (0, 0, 0, False) if interval is None else (interval.first, interval.last, interval.step, True)


def _record_bars(bars: DiskColumn, window_number: int, window: Window, numbers: Coordinates, step: int) -> None:
    """Record one bar in ten, with a hash of its prices. The last bar may still be open, so it is left out."""
    prices = [window.bars[name] for name in PRICES]
    for bar, number in enumerate(numbers[:-1]):
        if number is not None and number // max(1, step) % RECORDED_EVERY == 0:
            bars.append((window_number, number, hash(tuple(float(price[bar]) for price in prices))))


@dataclass(frozen=True)
class Spans:
    """Windows of several files on one scale: by file, the symbol number, first bar, last bar and bar length of each.

    `scale` is `time`, in nanoseconds, or `bar_index`. Only windows with `placed_N` have a position on it.
    """

    scale: str
    symbol_N: dict[str, Ints]
    first_N: dict[str, Ints]
    last_N: dict[str, Ints]
    bar_N: dict[str, Ints]
    placed_N: dict[str, Bools]


def symbol_key(symbol: str | None) -> str:
    """The key by which symbols are compared; "" without a symbol."""
    return (symbol or "").strip().casefold()


def common_spans(files: Mapping[str, WindowPositions], *, require_all: bool = False) -> Spans | None:
    """The windows of all files on one scale, or None if no scale has windows of every file.

    With `require_all`, the scale must have all windows. Time is preferred, unless most windows of a file lack it or the
    times are plain numbers.
    """
    kinds = _kinds(files)
    scales = {"time": {name: file.time for name, file in files.items()}} if kinds == {"dates"} else {}
    if not count_conflicts(files):
        scales["bar_index"] = {name: file.index for name, file in files.items()}
    if kinds == {"plain numbers"} and not count_conflicts(files, "time"):
        scales["time"] = {name: file.time for name, file in files.items()}
    for min_share in (1.0,) if require_all else (0.5, 1e-9):
        for scale, tracks in scales.items():
            if all(track.share >= min_share for track in tracks.values()):
                return _spans(scale, files, tracks)
    return None


def index_spans(files: Mapping[str, WindowPositions]) -> Spans | None:
    """The windows of all files by bar_index, or None if a row lacks it or it restarts."""
    tracks = {name: file.index for name, file in files.items()}
    if any(track.share < 1 for track in tracks.values()) or count_conflicts(files):
        return None
    return _spans("bar_index", files, tracks)


def missing_spans_reason(files: Mapping[str, WindowPositions]) -> str:
    """Why no common scale exists, in words."""
    if len(kinds := _kinds(files)) > 1:
        kinds_by_file = ", ".join(f"{file.kind} in {name}" for name, file in files.items() if file.kind)
        return f"times are {kinds_by_file}, which do not compare"
    if kinds == {"plain numbers"} and count_conflicts(files, "time"):
        return "times are plain numbers that restart, for example every day, and no reliable bar_index exists"
    if rows := count_conflicts(files):
        count = sum(map(len, files.values()))
        return (
            f"bar_index restarts ({rows:,} of {count:,} windows have other prices at a number than an earlier one), "
            f"and {'some rows have no' if kinds else 'there is no'} time"
        )
    scales = {name: _scales(file) for name, file in files.items()}
    if all(scales.values()) and not set.intersection(*scales.values()):
        by_file = "; ".join(f"{name} has {' and '.join(sorted(fields))}" for name, fields in scales.items())
        return f"no field gives positions in every file: {by_file}"
    return NO_SCALE


def pairs_without_common_symbol(files: Mapping[str, WindowPositions]) -> dict[tuple[str, str], str]:
    """Pairs of files without a common symbol, so that shared bars cannot be detected; with the reason."""
    reasons = {}
    for (first, file), (second, other) in combinations(files.items(), 2):
        if file.spellings.keys() & other.spellings.keys() or not (file.spellings or other.spellings):
            continue
        if file.spellings and other.spellings:
            reason = (
                f"no symbol is in both ({first}: {_symbols(file.spellings)}; {second}: {_symbols(other.spellings)})"
            )
        else:
            named, unnamed, source = (first, second, file) if file.spellings else (second, first, other)
            reason = f"no row of {unnamed} has a symbol, but rows of {named} have ({_symbols(source.spellings)})"
        reasons[first, second] = f"{reason}. Use the same symbol for a market in all files"
    return reasons


def symbol_notes(files: Mapping[str, WindowPositions]) -> dict[str, list[str]]:
    """By file, notices about its symbols in comparison with the files before it."""
    lines: dict[str, list[str]] = {name: [] for name in files}
    seen: dict[str, list[str]] = {}
    first = next(iter(files), "")
    for name, file in files.items():
        groups = []
        for key, spellings in file.spellings.items():
            spellings_so_far = seen.setdefault(key, [])
            new = [spelling for spelling in spellings if spelling not in spellings_so_far]
            spellings_so_far += new
            if new and len(spellings_so_far) > 1:
                groups.append(" = ".join(spellings_so_far))
        if groups:
            lines[name].append(f"symbols that differ only in case are treated as one: {_listed(groups)}")
        unseen = {key: file.spellings[key] for key in file.spellings if key not in files[first].spellings}
        if unseen and len(unseen) < len(file.spellings):
            count = int(np.isin(file.symbol_N, [n for n, symbol in enumerate(file.symbols) if symbol in unseen]).sum())
            lines[name].append(
                f"{count:,} of {len(file):,} rows have a symbol that no row of {first} has "
                f"({_symbols(unseen)}): bars that they share with its rows are not detected"
            )
    return lines


def count_conflicts(files: Mapping[str, WindowPositions], scale: str = "bar_index") -> int:
    """Number of windows whose bars differ from those of an earlier window at the same numbers.

    Returns 0 if they are few enough to be errors in the data. The scale `time` compares times that are plain numbers,
    which may restart every day as well.
    """
    if not files:
        return 0
    symbols = {symbol: n for n, symbol in enumerate({symbol for file in files.values() for symbol in file.symbols})}
    bars, owner, first = [], [], 0
    for file in files.values():
        recorded = file.bars if scale == "bar_index" else file.clock
        numbers = np.array([symbols[symbol] for symbol in file.symbols], dtype=np.int64)
        bars.append(np.stack([numbers[file.symbol_N[recorded["window"]]], recorded["number"], recorded["content"]]))
        owner.append(recorded["window"] + first)
        first += len(file)
    (symbol, number, content), window = np.concatenate(bars, axis=1), np.concatenate(owner)
    order = np.lexsort((number, symbol))  # stable: among equal entries, the earliest window comes first
    starts = np.ones(len(order), dtype=np.bool_)
    starts[1:] = (np.diff(symbol[order]) != 0) | (np.diff(number[order]) != 0)
    reference = content[order][starts][np.cumsum(starts) - 1] if len(order) else content
    conflicts = len(np.unique(window[order][content[order] != reference]))
    return conflicts if conflicts > MAX_CONFLICT_SHARE * sum(map(len, files.values())) else 0


def _kinds(files: Mapping[str, WindowPositions]) -> set[str]:
    return {file.kind for file in files.values() if file.kind}


def _symbols(spellings: Mapping[str, list[str]]) -> str:
    return _listed([each[0] for each in spellings.values()])


def _listed(names: Sequence[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:MAX_NAMED_SYMBOLS]) + (", …" if len(names) > MAX_NAMED_SYMBOLS else "")


def _scales(file: WindowPositions) -> set[str]:
    """The fields by which some rows of a file have a position."""
    return {name for name, track in (("time", file.time), ("bar_index", file.index)) if track.known.any()}


def _spans(scale: str, files: Mapping[str, WindowPositions], tracks: Mapping[str, IntervalColumns]) -> Spans:
    numbers = {symbol: n for n, symbol in enumerate(sorted({s for file in files.values() for s in file.symbols}))}
    numbers_of_file = {
        name: np.array([numbers[s] for s in file.symbols], dtype=np.int64) for name, file in files.items()
    }
    return Spans(
        scale,
        {name: numbers_of_file[name][file.symbol_N] for name, file in files.items()},
        {name: track.first for name, track in tracks.items()},
        {name: track.last for name, track in tracks.items()},
        {name: track.step for name, track in tracks.items()},
        {name: track.known for name, track in tracks.items()},
    )
