"""Files of bars → train.jsonl, val.jsonl, test.jsonl and the data card windows.json.

Input: paths, options and a folder. Output: the four files, and the content of the card. The card has the arguments, the
SHA-256 of each file, what was detected in the files, and counts, so that the windows can be made again. The same files
and options give the same bytes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray

from ctxtrain.bars.events import add_flags
from ctxtrain.bars.file_bars import ReadOptions
from ctxtrain.bars.names import COUNTS, DIRECTIONS, FLAGS
from ctxtrain.bars.options import EVERY, TRIPLE_BARRIER, WindowOptions, describe_arguments
from ctxtrain.bars.series import Market, Series, read_market
from ctxtrain.bars.windows import Windows, cut_windows, default_max_gap
from ctxtrain.config.value_types import FieldKind
from ctxtrain.data.row_schema import BAR_FIELDS
from ctxtrain.data.time_units import SECOND
from ctxtrain.errors import ConfigError
from ctxtrain.labels import LABELS
from ctxtrain.storage.atomic_files import make_folder, replace_atomically, to_json
from ctxtrain.storage.ownership import SPLITS, WINDOWS
from ctxtrain.storage.split_folder import require_split_folder

_WHOLE_IF_ALL_ARE = frozenset({"volume", "delta", "buy_vol", "sell_vol"})
_R_DECIMALS = 6
_NAMED_COLUMNS = 30  # of columns in one line on standard error; the card has all


def write_windows(
    paths: Sequence[Path],
    folder: Path,
    read: ReadOptions,
    options: WindowOptions,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Write the four files, and return the card. `say` receives what was detected in the files, a line at a time.

    Raises DataError for faulty files, and ConfigError for options that do not fit them or if the folder has files that
    are not those of earlier windows.
    """
    try:
        require_split_folder(folder, WINDOWS, SPLITS)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if options.label in read.fields:
        raise ConfigError(
            f"fields must not have the label column, which the model would read, got {options.label!r} for both. "
            "Leave it out of --fields."
        )
    names = (options.events, options.label)
    optional = tuple(name for name in names if isinstance(name, str) and name not in (EVERY, TRIPLE_BARRIER))
    market = read_market(paths, replace(read, optional=optional))
    notes = market.notes
    flagged = [add_flags(series, options, market.bar_length) for series in market.series]
    notes += list(dict.fromkeys(line for _, lines in flagged for line in lines))
    market = replace(market, series=[series for series, _ in flagged])
    for line in notes:
        say(_shorten(line))
    windows = cut_windows(market, options)
    make_folder(folder)
    with ExitStack() as written:  # all files are moved into place together, the card first
        files = {}
        for number, name in enumerate(SPLITS):
            of_split = np.flatnonzero(windows.split_W == number)
            stream, digest = written.enter_context(replace_atomically(folder / f"{name}.jsonl", 0)), hashlib.sha256()
            for row in _rows(market, windows, of_split, read.fields, options):
                stream.write(row)
                digest.update(row)
            files[name] = {**_file_facts(market, windows, of_split), "sha256": digest.hexdigest()}
        card = _card(market, windows, read, options, notes) | {"files": files}
        written.enter_context(replace_atomically(folder / WINDOWS, 0)).write(to_json(card))
    return card


def _card(
    market: Market, windows: Windows, read: ReadOptions, options: WindowOptions, notes: Sequence[str]
) -> dict[str, Any]:
    max_gap = default_max_gap(market.bar_length) if options.max_gap is None else options.max_gap
    return {
        "arguments": describe_arguments(read, options),
        "bars_a_window": options.bars,
        "timeframe": market.timeframe,
        "max_gap_in_bars": max_gap,
        "symbols": [series.symbol for series in market.series],
        "fields": {name: _kind(name, market.series) for name in read.fields},
        "sources": market.sources,
        "notes": list(notes),
        "bars": market.counts,
        "events": windows.counts | {"ambiguous": windows.ambiguous},
        "left_out": windows.left_out,
    }


def _kind(name: str, series: Sequence[Series]) -> FieldKind:
    """The kind of an own column, as `data.fields` declares it."""
    words = [value for one in series for value in one.words.get(name, ()) if value is not None]
    if words:
        return "flag" if all(isinstance(value, bool) for value in words) else "category"
    values = np.concatenate([one.columns[name] for one in series if name in one.columns] or [np.zeros(0)])
    present = values[~np.isnan(values)]
    return "count" if _are_whole(present) and (present >= 0).all() else "number"


def _file_facts(market: Market, windows: Windows, of_split: NDArray[np.intp]) -> dict[str, Any]:
    counts = Counter(LABELS[label] for label in windows.labels_W[of_split].tolist())
    times = [_time_of(market, windows, int(window)) for window in (of_split[0], of_split[-1])]
    return {
        "rows": len(of_split),
        "labels": {label: counts[label] for label in LABELS},
        "first_event": times[0],
        "last_event": times[1],
    }


def _time_of(market: Market, windows: Windows, window: int) -> str:
    series = market.series[int(windows.series_W[window])]
    return _times(series.opens_T[windows.event_W[window] : windows.event_W[window] + 1])[0]


def _rows(
    market: Market, windows: Windows, of_split: NDArray[np.intp], fields: Sequence[str], options: WindowOptions
) -> Iterator[bytes]:
    """One line of JSON per window. Each bar is written once and its bytes are used in all of its windows."""
    used: dict[int, tuple[int, list[bytes], list[str]]] = {}  # by series: first bar, bars as JSON, their times
    for number, series in enumerate(market.series):
        events = windows.event_W[of_split][windows.series_W[of_split] == number]
        if len(events):
            first, stop = int(events.min()) + 1 - options.bars, int(events.max()) + 1
            used[number] = (first, *_bar_lines(series, first, stop, fields))
    for window in of_split.tolist():
        number = int(windows.series_W[window])
        first, lines, times = used[number]
        last = int(windows.event_W[window]) - first
        series = market.series[number]
        head = {
            "id": f"{series.symbol}_{market.timeframe}_{times[last]}",
            "symbol": series.symbol,
            "timeframe": market.timeframe,
        }
        tail: dict[str, Any] = {"label": LABELS[windows.labels_W[window]]}
        if options.barriers:
            long_r, short_r, cost = (round(value, _R_DECIMALS) for value in windows.outcomes_W3[window].tolist())
            tail["outcome"] = {"long_r": long_r, "short_r": short_r, "cost": cost}
            tail["label_horizon"] = options.barriers.horizon
        yield b"".join(
            (
                orjson.dumps(head)[:-1], b',"context_bars":[', b",".join(lines[last + 1 - options.bars : last]),
                b'],"current_bar":', lines[last], b",", orjson.dumps(tail)[1:], b"\n",
            )
        )  # fmt: skip


def _bar_lines(series: Series, first: int, stop: int, fields: Sequence[str]) -> tuple[list[bytes], list[str]]:
    """The bars `first` to `stop`, exclusive, as JSON objects, and their times."""
    columns: dict[str, list[Any]] = {"time": _times(series.opens_T[first:stop])}
    for name in (*BAR_FIELDS, *fields):
        if name in columns:
            continue
        if name in series.columns:
            columns[name] = _values(name, series.columns[name])[first:stop]
        elif name in series.words and name in fields:
            columns[name] = series.words[name][first:stop]
    names = list(columns)
    rows = zip(*columns.values(), strict=True)
    return [orjson.dumps(dict(zip(names, row, strict=True)), default=str) for row in rows], columns["time"]


def _values(name: str, values_T: NDArray[np.float64]) -> list[Any]:
    """JSON values of a column; NaN becomes null. Whether a quantity is whole is decided for all of its values."""
    missing = np.isnan(values_T)
    present = values_T[~missing]
    if name in FLAGS:
        values: list[Any] = (values_T == 1).tolist()
    elif name in DIRECTIONS | COUNTS or ((name not in BAR_FIELDS or name in _WHOLE_IF_ALL_ARE) and _are_whole(present)):
        values = np.where(missing, 0, values_T).astype(np.int64).tolist()
    else:
        values = values_T.tolist()
    if missing.any():
        values = [None if lacks else value for value, lacks in zip(values, missing.tolist(), strict=True)]
    return values


def _are_whole(values: NDArray[np.float64]) -> bool:
    return bool((values == np.rint(values)).all() and (np.abs(values) < 2**53).all())


def _times(opens: NDArray[np.int64]) -> list[str]:
    """ISO 8601 in UTC, with a fraction of a second only if one has it."""
    unit: Literal["s", "ms", "ns"] = "s"
    if (opens % SECOND).any():
        unit = "ns" if (opens % (SECOND // 1000)).any() else "ms"
    return [f"{text}Z" for text in np.datetime_as_string(opens.astype("datetime64[ns]"), unit=unit).tolist()]


def _shorten(line: str) -> str:
    names = line.split(", ")
    if "columns not read: " not in line or len(names) <= _NAMED_COLUMNS:
        return line
    return f"{', '.join(names[:_NAMED_COLUMNS])} and {len(names) - _NAMED_COLUMNS} more, all in {WINDOWS}"
