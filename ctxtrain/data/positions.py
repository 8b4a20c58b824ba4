"""Where the windows of files lie, on one scale: time where the files have it, else bar_index where that is sound.

Comes in: windows, one by one. Goes out: `Places` of a file, some 150 bytes a row, and `Spans` of several files.

A bar_index that begins anew (each day, each contract) names different bars by one number, and would join windows that
share nothing. So a tenth of the bars is remembered by their prices: those whose number, counted in steps of a bar, is a
multiple of ten. A window of 30 bars has some three, also where numbers go in steps of five or some are left out. Where
windows disagree about them too often, bar_index places nothing. The same holds for times that are plain numbers.

Symbols are compared without regard to case and to blanks around them.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.bar_order import Place, Stamps
from ctxtrain.data.schema import Window
from ctxtrain.data.time_units import NUMBER

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

REMEMBERED = 10  # every so many bars
SYMBOLS_NAMED = 3
SOUND = 0.05  # share of the windows that may disagree with others about a bar: a mistake, not a rule
UNPLACED = "some rows have neither time nor bar_index on every bar"
PRICES = ("open", "high", "low", "close")


@dataclass
class Track:
    """The places of a file's windows by one scale; 0 where a window has none."""

    first: array[int] = field(default_factory=lambda: array("q"))
    last: array[int] = field(default_factory=lambda: array("q"))
    step: array[int] = field(default_factory=lambda: array("q"))
    known: array[int] = field(default_factory=lambda: array("b"))

    def see(self, place: Place | None) -> None:
        found = place or Place(0, 0, 0)
        self.first.append(found.first)
        self.last.append(found.last)
        self.step.append(found.step)
        self.known.append(place is not None)

    @property
    def share(self) -> float:
        return sum(self.known) / max(1, len(self.known))


@dataclass
class Places:
    """One entry a window, in the order of the file; `spellings` has each symbol as rows write it, oldest first."""

    symbols: list[str] = field(default_factory=list)
    time: Track = field(default_factory=Track)
    index: Track = field(default_factory=Track)
    units: set[str] = field(default_factory=set)
    bars: array[int] = field(default_factory=lambda: array("q"))  # three a remembered bar: window, number, content
    clock: array[int] = field(default_factory=lambda: array("q"))  # the same by times that are plain numbers
    spellings: dict[str, list[str]] = field(default_factory=dict)
    _keys: dict[str, str] = field(default_factory=dict)  # one object a symbol, however many rows it has

    def see(self, window: Window) -> None:
        key = symbol_key(window.symbol)
        self.symbols.append(self._keys.setdefault(key, key))
        if window.symbol and window.symbol not in (spellings := self.spellings.setdefault(key, [])):
            spellings.append(window.symbol)
        placed = window.placed
        self.time.see(placed.time)
        self.index.see(placed.index)
        if placed.unit:
            self.units.add(placed.unit)
        if placed.index:
            self._remember(self.bars, window, placed.indices, placed.index.step)
        if placed.time and placed.unit == NUMBER:
            self._remember(self.clock, window, placed.counts, placed.time.step)

    def _remember(self, bars: array[int], window: Window, numbers: Stamps, step: int) -> None:
        """A tenth of the bars. The last one is left out: at the event it may still be open."""
        prices = [window.bars[name] for name in PRICES]
        for bar, number in enumerate(numbers[:-1]):
            if number is not None and number // max(1, step) % REMEMBERED == 0:
                bars.extend((len(self.symbols) - 1, number, hash(tuple(float(price[bar]) for price in prices))))

    @property
    def kind(self) -> str:
        """What the times of the file are: dates, or plain numbers; "" without any."""
        return "" if not self.units else "plain numbers" if NUMBER in self.units else "dates"


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
        count = sum(len(one.symbols) for one in files.values())
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
            count = sum(symbol in strange for symbol in one.symbols)
            lines[name].append(
                f"{count:,} of {len(one.symbols):,} rows have a symbol that no row of {first} has "
                f"({_symbols(strange)}): bars that they share with its rows are not seen"
            )
    return lines


def disagreeing(files: Mapping[str, Places], scale: str = "bar_index") -> int:
    """Windows whose bars differ from what an earlier window has at the same numbers; 0 if so few that it is no rule.

    With the scale `time` at the same times, where these are plain numbers: those of a day begin anew, too.
    """
    seen: dict[tuple[str, int], int] = {}
    found = 0
    for one in files.values():
        other = set()
        bars = one.bars if scale == "bar_index" else one.clock
        for window, number, content in zip(bars[::3], bars[1::3], bars[2::3], strict=True):
            if seen.setdefault((one.symbols[window], number), content) != content:
                other.add(window)
        found += len(other)
    return found if found > SOUND * sum(len(one.symbols) for one in files.values()) else 0


def _kinds(files: Mapping[str, Places]) -> set[str]:
    return {one.kind for one in files.values() if one.kind}


def _symbols(spellings: Mapping[str, list[str]]) -> str:
    return _listed([each[0] for each in spellings.values()])


def _listed(names: Sequence[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:SYMBOLS_NAMED]) + (", …" if len(names) > SYMBOLS_NAMED else "")


def _scales(one: Places) -> set[str]:
    """The fields by which some rows of a file have a place."""
    return {name for name, track in (("time", one.time), ("bar_index", one.index)) if any(track.known)}


def _spans(scale: str, files: Mapping[str, Places], tracks: Mapping[str, Track]) -> Spans:
    numbers = {symbol: n for n, symbol in enumerate(sorted({s for one in files.values() for s in one.symbols}))}
    return Spans(
        scale,
        {name: np.array([numbers[s] for s in one.symbols], dtype=np.int64) for name, one in files.items()},
        {name: np.array(track.first, dtype=np.int64) for name, track in tracks.items()},
        {name: np.array(track.last, dtype=np.int64) for name, track in tracks.items()},
        {name: np.array(track.step, dtype=np.int64) for name, track in tracks.items()},
        {name: np.array(track.known, dtype=np.bool_) for name, track in tracks.items()},
    )
