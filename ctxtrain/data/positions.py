"""Where the windows of files lie, on one scale: time where the files have it, else bar_index where that is sound.

Comes in: windows, one by one. Goes out: `Places` of a file, as columns on disk, and `Spans` of several files.

A bar_index that begins anew (each day, each contract) names different bars by one number, and would join windows that
share nothing. So a tenth of the bars is remembered by their prices: those whose number, counted in steps of a bar, is a
multiple of ten. A window of 30 bars has some three, also where numbers go in steps of five or some are left out. Where
windows disagree about them too often, bar_index places nothing. The same holds for times that are plain numbers.

Symbols are compared without regard to case and to blanks around them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.bar_order import Place, Stamps
from ctxtrain.data.columns import DiskColumn
from ctxtrain.data.parse_window import Window
from ctxtrain.data.time_units import NUMBER

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

REMEMBERED = 10  # every so many bars
SYMBOLS_NAMED = 3
SOUND = 0.05  # share of the windows that may disagree with others about a bar: a mistake, not a rule
UNPLACED = "some rows have neither time nor bar_index on every bar"
PRICES = ("open", "high", "low", "close")
_PLACE = (("first", "i8"), ("last", "i8"), ("step", "i8"), ("known", "?"))
_WINDOW = [("symbol", "i4"), *((f"{scale}.{name}", kind) for scale in ("time", "index") for name, kind in _PLACE)]
_BAR = [("window", "i8"), ("number", "i8"), ("content", "i8")]


@dataclass(frozen=True)
class Track:
    """The places of a file's windows by one scale, each of shape (windows,); 0 where a window has none."""

    first: Ints
    last: Ints
    step: Ints
    known: Bools

    @property
    def share(self) -> float:
        return float(self.known.sum()) / max(1, len(self.known))


@dataclass(frozen=True)
class Places:
    """Where the windows of a file lie, in the order of the file.

    `symbol_N` indexes `symbols`, which has what symbols are compared by; `spellings` has each symbol as rows write it,
    oldest first. `bars` has the remembered bars by bar_index, and `clock` by times that are plain numbers.
    """

    symbol_N: Ints
    symbols: list[str]
    time: Track
    index: Track
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
        """What the times of the file are: dates, or plain numbers; "" without any."""
        return "" if not self.units else "plain numbers" if NUMBER in self.units else "dates"


class PlacesBuilder:
    """Sees windows one by one; then gives their `Places`."""

    def __init__(self) -> None:
        self._windows = DiskColumn(_WINDOW)
        self._bars, self._clock = DiskColumn(_BAR), DiskColumn(_BAR)
        self._symbols: dict[str, int] = {}
        self._units: set[str] = set()
        self._spellings: dict[str, list[str]] = {}

    def see(self, window: Window) -> None:
        key = symbol_key(window.symbol)
        symbol = self._symbols.setdefault(key, len(self._symbols))
        if window.symbol and window.symbol not in (spellings := self._spellings.setdefault(key, [])):
            spellings.append(window.symbol)
        placed, number = window.placed, len(self._windows)
        self._windows.append((symbol, *_entry(placed.time), *_entry(placed.index)))
        if placed.unit:
            self._units.add(placed.unit)
        if placed.index:
            _remember(self._bars, number, window, placed.indices, placed.index.step)
        if placed.time and placed.unit == NUMBER:
            _remember(self._clock, number, window, placed.counts, placed.time.step)

    def places(self) -> Places:
        windows = self._windows.array()
        time, index = (
            Track(*(windows[f"{scale}.{name}"] for name in ("first", "last", "step", "known")))
            for scale in ("time", "index")
        )
        return Places(
            windows["symbol"],
            list(self._symbols),
            time,
            index,
            self._units,
            self._bars.array(),
            self._clock.array(),
            self._spellings,
        )


def places_of(windows: Iterable[Window]) -> Places:
    """Where windows lie."""
    builder = PlacesBuilder()
    for window in windows:
        builder.see(window)
    return builder.places()


def _entry(place: Place | None) -> tuple[int, int, int, bool]:
    return (0, 0, 0, False) if place is None else (place.first, place.last, place.step, True)


def _remember(bars: DiskColumn, window_number: int, window: Window, numbers: Stamps, step: int) -> None:
    """A tenth of the bars. The last one is left out: at the event it may still be open."""
    prices = [window.bars[name] for name in PRICES]
    for bar, number in enumerate(numbers[:-1]):
        if number is not None and number // max(1, step) % REMEMBERED == 0:
            bars.append((window_number, number, hash(tuple(float(price[bar]) for price in prices))))


@dataclass(frozen=True)
class Spans:
    """Where windows lie: symbol number, first and last bar of each, by file, and `bar`, the length of a bar of each.

    `scale` is `time`, in nanoseconds, or `bar_index`. Only the windows of `placed` have a place on it.
    """

    scale: str
    symbol_N: dict[str, Ints]
    first_N: dict[str, Ints]
    last_N: dict[str, Ints]
    bar_N: dict[str, Ints]
    placed_N: dict[str, Bools]


def symbol_key(symbol: str | None) -> str:
    """What symbols are compared by; "" without one."""
    return (symbol or "").strip().casefold()


def spans_of(files: Mapping[str, Places], *, whole: bool = False) -> Spans | None:
    """The windows of all files on one scale, or None where there is none that places windows of each.

    With `whole`, where there is none that places all windows. Time is preferred unless most windows of a file lack it,
    or it is a plain number.
    """
    kinds = _kinds(files)
    scales = {"time": {name: one.time for name, one in files.items()}} if kinds == {"dates"} else {}
    if not disagreeing(files):
        scales["bar_index"] = {name: one.index for name, one in files.items()}
    if kinds == {"plain numbers"} and not disagreeing(files, "time"):
        scales["time"] = {name: one.time for name, one in files.items()}
    for least in (1.0,) if whole else (0.5, 1e-9):
        for scale, tracks in scales.items():
            if all(track.share >= least for track in tracks.values()):
                return _spans(scale, files, tracks)
    return None


def why_no_spans(files: Mapping[str, Places]) -> str:
    """Why there is no scale, in words."""
    if len(kinds := _kinds(files)) > 1:
        told = ", ".join(f"{one.kind} in {name}" for name, one in files.items() if one.kind)
        return f"times are {told}, which do not compare"
    if kinds == {"plain numbers"} and disagreeing(files, "time"):
        return "times are plain numbers that begin anew, as those of a day do, and there is no bar_index that does not"
    if rows := disagreeing(files):
        count = sum(map(len, files.values()))
        return (
            f"bar_index begins anew ({rows:,} of {count:,} windows have other prices at a number than one before), "
            f"and {'some rows have no' if kinds else 'there is no'} time"
        )
    scales = {name: _scales(one) for name, one in files.items()}
    if all(scales.values()) and not set.intersection(*scales.values()):
        has = "; ".join(f"{name} has {' and '.join(sorted(found))}" for name, found in scales.items())
        return f"no field places rows of every file: {has}"
    return UNPLACED


def no_common_symbol(files: Mapping[str, Places]) -> dict[tuple[str, str], str]:
    """Pairs of files whose rows are never of one symbol, so that bars that they share are not seen; with the reason."""
    found = {}
    for (first, one), (second, other) in combinations(files.items(), 2):
        if one.spellings.keys() & other.spellings.keys() or not (one.spellings or other.spellings):
            continue
        if one.spellings and other.spellings:
            reason = f"no symbol is in both ({first}: {_symbols(one.spellings)}; {second}: {_symbols(other.spellings)})"
        else:
            named, bare, has = (first, second, one) if one.spellings else (second, first, other)
            reason = f"no row of {bare} has a symbol, and rows of {named} have ({_symbols(has.spellings)})"
        found[first, second] = f"{reason}. Give one market the same symbol in all files"
    return found


def symbol_lines(files: Mapping[str, Places]) -> dict[str, list[str]]:
    """By file, what a person should know of its symbols beside those of the files before it."""
    lines: dict[str, list[str]] = {name: [] for name in files}
    seen: dict[str, list[str]] = {}
    first = next(iter(files), "")
    for name, one in files.items():
        several = []
        for key, spellings in one.spellings.items():
            known = seen.setdefault(key, [])
            new = [spelling for spelling in spellings if spelling not in known]
            known += new
            if new and len(known) > 1:
                several.append(" = ".join(known))
        if several:
            lines[name].append(f"symbols that differ in case alone are taken as one: {_listed(several)}")
        strange = {key: one.spellings[key] for key in one.spellings if key not in files[first].spellings}
        if strange and len(strange) < len(one.spellings):
            count = int(np.isin(one.symbol_N, [n for n, symbol in enumerate(one.symbols) if symbol in strange]).sum())
            lines[name].append(
                f"{count:,} of {len(one):,} rows have a symbol that no row of {first} has "
                f"({_symbols(strange)}): bars that they share with its rows are not seen"
            )
    return lines


def disagreeing(files: Mapping[str, Places], scale: str = "bar_index") -> int:
    """Windows whose bars differ from what an earlier window has at the same numbers; 0 if so few that it is no rule.

    With the scale `time` at the same times, where these are plain numbers: those of a day begin anew, too.
    """
    if not files:
        return 0
    symbols = {symbol: n for n, symbol in enumerate({symbol for one in files.values() for symbol in one.symbols})}
    bars, owner, first = [], [], 0
    for one in files.values():
        own = one.bars if scale == "bar_index" else one.clock
        numbers = np.array([symbols[symbol] for symbol in one.symbols], dtype=np.int64)
        bars.append(np.stack([numbers[one.symbol_N[own["window"]]], own["number"], own["content"]]))
        owner.append(own["window"] + first)
        first += len(one)
    (symbol, number, content), window = np.concatenate(bars, axis=1), np.concatenate(owner)
    order = np.lexsort((number, symbol))  # stable, so the first of equal ones is that of the earliest window
    starts = np.ones(len(order), dtype=np.bool_)
    starts[1:] = (np.diff(symbol[order]) != 0) | (np.diff(number[order]) != 0)
    earliest = content[order][starts][np.cumsum(starts) - 1] if len(order) else content
    found = len(np.unique(window[order][content[order] != earliest]))
    return found if found > SOUND * sum(map(len, files.values())) else 0


def _kinds(files: Mapping[str, Places]) -> set[str]:
    return {one.kind for one in files.values() if one.kind}


def _symbols(spellings: Mapping[str, list[str]]) -> str:
    return _listed([each[0] for each in spellings.values()])


def _listed(names: Sequence[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:SYMBOLS_NAMED]) + (", …" if len(names) > SYMBOLS_NAMED else "")


def _scales(one: Places) -> set[str]:
    """The fields by which some rows of a file have a place."""
    return {name for name, track in (("time", one.time), ("bar_index", one.index)) if track.known.any()}


def _spans(scale: str, files: Mapping[str, Places], tracks: Mapping[str, Track]) -> Spans:
    numbers = {symbol: n for n, symbol in enumerate(sorted({s for one in files.values() for s in one.symbols}))}
    own = {name: np.array([numbers[s] for s in one.symbols], dtype=np.int64) for name, one in files.items()}
    return Spans(
        scale,
        {name: own[name][one.symbol_N] for name, one in files.items()},
        {name: track.first for name, track in tracks.items()},
        {name: track.last for name, track in tracks.items()},
        {name: track.step for name, track in tracks.items()},
        {name: track.known for name, track in tracks.items()},
    )
