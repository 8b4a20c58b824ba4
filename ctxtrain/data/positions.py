"""Where the windows of files lie, on one scale: time where the files have it, else bar_index where that is sound.

Comes in: windows, one by one. Goes out: `Places` of a file, some 150 bytes a row, and `Spans` of several files.

A bar_index that begins anew (each day, each contract) names different bars by one number, and would join windows that
share nothing. So the bars whose number is a multiple of ten are remembered by their prices; a window of 30 bars has
three. Where windows disagree about them too often, bar_index places nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.bar_order import Place
from ctxtrain.data.schema import Window
from ctxtrain.data.time_units import NUMBER

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

REMEMBERED = 10  # every so many bars
SOUND = 0.05  # share of the windows that may disagree with others about a bar: a mistake, not a rule
UNPLACED = "some rows have neither time nor bar_index on every bar"


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
    """One entry a window, in the order of the file."""

    symbols: list[str] = field(default_factory=list)
    time: Track = field(default_factory=Track)
    index: Track = field(default_factory=Track)
    units: set[str] = field(default_factory=set)
    bars: array[int] = field(default_factory=lambda: array("q"))  # three a remembered bar: window, number, content
    clock: array[int] = field(default_factory=lambda: array("q"))  # the same of a first bar's time, a plain number
    _names: dict[str, str] = field(default_factory=dict)

    def see(self, window: Window) -> None:
        symbol = window.symbol or ""
        self.symbols.append(self._names.setdefault(symbol, symbol))
        placed = window.placed
        self.time.see(placed.time)
        self.index.see(placed.index)
        if placed.unit:
            self.units.add(placed.unit)
        if placed.unit == NUMBER and placed.time:
            first = hash(tuple(float(window.bars[name][0]) for name in ("open", "high", "low", "close")))
            self.clock.extend((len(self.symbols) - 1, placed.time.first, first))
        if placed.index and placed.index.last - placed.index.first == len(window.bars["close"]) - 1:
            self._remember(window, placed.index)

    def _remember(self, window: Window, place: Place) -> None:
        """The last bar is left out: at the event it may still be open."""
        prices = [window.bars[name] for name in ("open", "high", "low", "close")]
        for bar in range(-place.first % REMEMBERED, len(prices[0]) - 1, REMEMBERED):
            content = hash(tuple(float(price[bar]) for price in prices))
            self.bars.extend((len(self.symbols) - 1, place.first + bar, content))

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
    return UNPLACED


def disagreeing(files: Mapping[str, Places], scale: str = "bar_index") -> int:
    """Windows whose bars differ from what an earlier window has at the same numbers; 0 if so few that it is no rule.

    With the scale `time` of the first bars of windows, where times are plain numbers: those of a day begin anew, too.
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
