"""Symbols of several files that may be one market.

Input: the bars of the files. Output: notes about files that look like parts of one market although their names give
different symbols, or a DataError for symbols that differ only in case.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from ctxtrain.bars.cells import is_tick_volume
from ctxtrain.bars.file_bars import FileBars
from ctxtrain.data.time_units import DAY
from ctxtrain.errors import DataError

_NEAR = 0.1  # relative difference of two prices of one market
_PAUSE = 10 * DAY  # between the last bar of a file and the first of the next
_REMEDY = "--symbol makes them one market"


def require_distinct_symbols(files: Sequence[FileBars]) -> None:
    """Raise DataError if symbols differ only in case."""
    spellings: dict[str, dict[str, str]] = {}
    for file in files:
        for symbol in np.unique(file.symbols_T).tolist():
            spellings.setdefault(symbol.casefold(), {}).setdefault(symbol, str(file.source.path))
    faults = []
    for found in spellings.values():
        if len(found) > 1:
            shown = ", ".join(f"{symbol} in {path}" for symbol, path in found.items())
            faults.append(
                f"symbols must not differ only in case, got {shown}. Write them alike, or give one with --symbol."
            )
    if faults:
        raise DataError(faults)


def require_one_volume(files: Sequence[FileBars]) -> None:
    """Raise DataError if the volume of a symbol is ticks in one file and traded in another."""
    kinds: dict[str, dict[bool, FileBars]] = {}
    for file in files:
        for symbol in np.unique(file.symbols_T).tolist() if file.volume_column else []:
            kinds.setdefault(symbol, {}).setdefault(is_tick_volume(str(file.volume_column)), file)
    for symbol, found in kinds.items():
        if len(found) > 1:
            ticks, traded = found[True], found[False]
            raise DataError(
                f"{symbol}: the volume of all files must be of one kind, got ticks in {ticks.source.path} (column "
                f"{ticks.volume_column}) and traded volume in {traded.source.path} (column {traded.volume_column}). "
                f"Name one with --columns volume={ticks.volume_column}, or leave it out with --columns volume="
            )


def tell_similar_files(files: Sequence[FileBars]) -> list[str]:
    """One line for each two files whose names give two symbols, but whose bars continue or equal each other."""
    named = [file for file in files if file.is_named_by_file]
    named.sort(key=lambda file: int(file.bar_times.stamps_T.min()))
    notes = []
    for first, second in combinations(named, 2):
        names = (str(first.symbols_T[0]), str(second.symbols_T[0]))
        if names[0] == names[1]:
            continue
        how = "follow one another at similar prices" if _continues(first, second) else ""
        how = how or ("have equal bars" if _repeats(first, second) else "")
        if how:
            paths = f"{first.source.path} and {second.source.path}"
            notes.append(f"{paths} {how}, but are read as the markets {names[0]} and {names[1]}; {_REMEDY}")
    return notes


def _continues(first: FileBars, second: FileBars) -> bool:
    pause = int(second.bar_times.stamps_T.min()) - int(first.bar_times.stamps_T.max())
    last = first.columns["close"][first.bar_times.stamps_T.argmax()]
    opened = second.columns["open"][second.bar_times.stamps_T.argmin()]
    return 0 < pause <= _PAUSE and bool(abs(last - opened) <= _NEAR * max(abs(last), abs(opened)))


def _repeats(first: FileBars, second: FileBars) -> bool:
    """Whether most bars of equal times have equal closes."""
    _, bars, others = np.intersect1d(first.bar_times.stamps_T, second.bar_times.stamps_T, return_indices=True)
    equal = first.columns["close"][bars] == second.columns["close"][others]
    return len(bars) > 0 and bool(equal.mean() > 0.5)
