"""Flags of a series, and the bars that are events.

Input: a `Series` and the options. Output: the series with the flags that were asked for, and the indices of its events.
A flag is computed from the bars up to its own, so no event depends on a later bar.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ctxtrain.bars.names import FLAGS
from ctxtrain.bars.options import EVERY, WindowOptions
from ctxtrain.bars.series import Series
from ctxtrain.bars.structure import add_structure, higher_direction
from ctxtrain.errors import ConfigError, DataError, short_repr

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

_SIDES = {"up": 1, "down": -1}
_WORDS = {"true": 1.0, "1": 1.0, "false": 0.0, "0": 0.0}


def add_flags(series: Series, options: WindowOptions, bar_length: int) -> tuple[Series, list[str]]:
    """The series with structure flags and `htf_dir` as far as the options ask for them, and what was done.

    Flags of the file are kept; only flags that it lacks are computed.
    """
    columns, notes = dict(series.columns), []
    if options.structure:
        computed = _structure(series)
        added = {name: values for name, values in computed.items() if name not in columns}
        columns |= added
        kept = sorted(computed.keys() - added.keys())
        notes.append(
            f"structure: computed {len(added)} fields" + (f"; from the file: {', '.join(kept)}" if kept else "")
        )
    if options.higher:
        source = ", in place of that of the file" if "htf_dir" in columns else ""
        notes.append(f"htf_dir: computed from completed bars of {options.higher} bars{source}")
        high, low, close = (columns[name] for name in ("high", "low", "close"))
        direction = higher_direction(series.opens_T, high, low, close, bar_length, options.higher)
        columns["htf_dir"] = direction.astype(np.float64)
    return replace(series, columns=columns), notes


def find_events(series: Series, events: str | int) -> Ints:
    """The bars that are events, in order. Raises ConfigError if `events` names no column or flag."""
    if events == EVERY:
        return np.arange(len(series))
    if isinstance(events, int):
        return np.arange(events - 1, len(series), events)
    is_true = _named_flag(series, events)
    return np.flatnonzero(is_true & ~np.concatenate(([False], is_true[:-1])))


def _named_flag(series: Series, name: str) -> Bools:
    """Where a column of the file, one of its two sides, or else a computed flag is true."""
    if name in series.columns:
        return _as_flag(series, name)
    if name in series.words:
        return _words_as_flag(series, name)
    sides = [f"{name}_{side}" for side in _SIDES if f"{name}_{side}" in series.columns]
    if sides:
        return np.asarray(np.any([_as_flag(series, side) for side in sides], axis=0))
    computed = _structure(series)
    if name in computed and name in FLAGS:
        return np.asarray(computed[name] != 0)
    base, _, side = name.rpartition("_")
    if side in _SIDES and base in computed and f"{base[:3]}_dir" in computed:
        return np.asarray((computed[base] != 0) & (computed[f"{base[:3]}_dir"] == _SIDES[side]))
    known = ", ".join(sorted(FLAGS & computed.keys()))
    raise ConfigError(
        f"events must be every, a number of bars, a column of the file or a flag of the structure, got {name!r}. "
        f"Use one of {known}."
    )


def _as_flag(series: Series, name: str) -> Bools:
    values = series.columns[name]
    other = ~np.isnan(values) & (values != 0) & (values != 1)
    if other.any():
        raise DataError(
            f"{series.symbol}: the event {name} must be true or false on each bar, got {values[other][0]:g}. "
            "Name a column of flags with --events."
        )
    return np.asarray(values == 1)


def _words_as_flag(series: Series, name: str) -> Bools:
    values = [None if word is None else _WORDS.get(str(word).lower(), np.nan) for word in series.words[name]]
    unknown = next((n for n, value in enumerate(values) if value is not None and np.isnan(value)), None)
    if unknown is not None:
        raise DataError(
            f"{series.symbol}: the event {name} must be true or false on each bar, got "
            f"{short_repr(series.words[name][unknown])}. Name a column of flags with --events."
        )
    return np.array([value == 1 for value in values], np.bool_)


def _structure(series: Series) -> dict[str, NDArray[np.float64]]:
    """Flags and measures of `structure.py`. Without volume, the strength of a leg is its travel alone."""
    volume = series.columns.get("volume", np.ones(len(series)))
    bars = {name: series.columns[name] for name in ("high", "low", "close")} | {"volume": np.nan_to_num(volume)}
    return {name: values.astype(np.float64) for name, values in add_structure(bars).items() if name not in bars}
