"""Windows as Arrow columns on disk: parsed once, read as often as needed.

Input: windows, one by one. Output: a `WindowTable` with memory-mapped columns. It returns all or selected windows
without copying their numbers and without the original file.

Columns, one entry per window:

    line                    line number in the file
    id, symbol, text        text, null if the window has none
    label                   index into `LABELS`, null without a label
    label_horizon           bars after the event that the label looked at, null if the row does not say
    bars.NAME               float64 values of a field, oldest bar first; null if the window lacks the field
    words.NAME              the same for an own field that is a category, as text
    features.name, .value   lists of equal length: the numbers
    features.word_name, .word    lists of equal length: the words
    time.*, index.*         first, last and step of `Interval`, null if unknown
    unit, time_name, indices, numeric_times    as in `WindowPosition`

A table takes 8 bytes per number. Increase `VERSION` whenever parsing changes, so that cached tables of earlier releases
are not used.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ctxtrain.data.bar_order import Interval, WindowPosition
from ctxtrain.data.columns import temporary_disk
from ctxtrain.data.parse_window import Window
from ctxtrain.data.row_schema import BAR_FIELDS, NO_FIELDS, OwnFields

Ints = NDArray[np.int64]

VERSION = 3
ROWS_PER_BATCH = 256
_ENDS = ("first", "last", "step")
_NUMBERS = pa.list_(pa.float64())
_WORDS = pa.list_(pa.string())
_LISTED = ("bars.", "features.value")  # columns that are read without making Python numbers of them


def table_schema(own: OwnFields = NO_FIELDS) -> pa.Schema:
    """The columns of a table; `own` are the bar fields that the user declares."""
    numbers = [*BAR_FIELDS, *(name for name, kind in own.items() if kind != "category")]
    return pa.schema(
        [
            ("line", pa.int64()),
            ("id", pa.string()),
            ("symbol", pa.string()),
            ("text", pa.string()),
            ("label", pa.int8()),
            ("label_horizon", pa.int32()),
            *((f"bars.{name}", _NUMBERS) for name in numbers),
            *((f"words.{name}", _WORDS) for name, kind in own.items() if kind == "category"),
            ("features.name", _WORDS),
            ("features.value", _NUMBERS),
            ("features.word_name", _WORDS),
            ("features.word", _WORDS),
            *((f"{kind}.{end}", pa.int64()) for kind in ("time", "index") for end in _ENDS),
            ("unit", pa.string()),
            ("time_name", pa.string()),
            ("indices", pa.list_(pa.int64())),
            ("numeric_times", pa.list_(pa.int64())),
        ]
    )


class TableWriter:
    """Writes windows to a file, which is removed if the block ends without `finish`.

    Without a `path` the file is unnamed, so the system removes it however the process ends. Raises OSError if the disk
    is full.
    """

    def __init__(self, path: Path | None = None, own: OwnFields = NO_FIELDS) -> None:
        self._path = path
        self._schema = table_schema(own)
        self._file: Any = tempfile.TemporaryFile() if path is None else path.open("x+b")  # noqa: SIM115  # __exit__ closes
        self._writer = pa.ipc.new_file(self._file, self._schema)
        self._windows: list[tuple[int, Window]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def add(self, line: int, window: Window) -> None:
        self._windows.append((line, window))
        if len(self._windows) == ROWS_PER_BATCH:
            self._write()

    def finish(self, path: Path | None = None) -> WindowTable:
        """The table of all windows. A named file is moved to `path`."""
        self._write()
        with self._naming_disk():
            self._writer.close()
            self._file.flush()
            if self._path is not None and path is not None:
                self._path.replace(path)
        return WindowTable(self._file)

    def _write(self) -> None:
        if self._windows:
            with self._naming_disk():
                self._writer.write_batch(_batch(self._windows, self._schema))
            self._windows = []

    def _naming_disk(self) -> AbstractContextManager[None]:
        return temporary_disk("a table of the rows") if self._path is None else nullcontext()


class WindowTable:
    """The windows of a file, read from columns on disk. Rows are numbered from 0, in file order."""

    def __init__(self, file: IO[bytes]) -> None:
        # The mapping stays valid after the file is closed.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._reader = pa.ipc.open_file(pa.py_buffer(mapped))
        batches = self._reader.num_record_batches
        last = len(self._reader.get_batch(batches - 1)) if batches else 0
        self._rows: int = max(0, batches - 1) * ROWS_PER_BATCH + last

    @classmethod
    def open(cls, path: Path, own: OwnFields = NO_FIELDS) -> WindowTable:
        """Open a table file. Raises OSError or ValueError if it is no complete table of these fields."""
        with path.open("rb") as file:
            table = cls(file)
        if table._reader.schema != table_schema(own):
            raise ValueError("unexpected columns")
        return table

    def __len__(self) -> int:
        return self._rows

    def windows(self, prefix: str, rows: Ints | None = None) -> Iterator[Window]:
        """The windows of these rows, in the given order, or of all rows; `prefix` begins their locations."""
        if rows is None:
            for number in range(self._reader.num_record_batches):
                yield from _windows(self._reader.get_batch(number), prefix)
            return
        for run in _runs(rows):
            number, first = divmod(int(run[0]), ROWS_PER_BATCH)
            batch = self._reader.get_batch(number)
            if len(run) == int(run[-1]) - int(run[0]) + 1:
                yield from _windows(batch.slice(first, len(run)), prefix)
            else:
                yield from _windows(batch.take(pa.array(run - number * ROWS_PER_BATCH)), prefix)

    def value(self, column: str, row: int) -> Any:
        """One value of a column, as a Python object."""
        number, offset = divmod(row, ROWS_PER_BATCH)
        return self._reader.get_batch(number).column(column)[offset].as_py()


def _runs(rows: Ints) -> Iterator[Ints]:
    """Split rows into runs of increasing rows within one batch."""
    batch = rows // ROWS_PER_BATCH
    ends = np.flatnonzero((np.diff(batch) != 0) | (np.diff(rows) <= 0)) + 1
    yield from (piece for piece in np.split(rows, ends) if len(piece))


def _batch(windows: Sequence[tuple[int, Window]], schema: pa.Schema) -> pa.RecordBatch:
    lines, rows = zip(*windows, strict=True)
    columns: dict[str, Any] = {
        "line": lines,
        "id": [row.id for row in rows],
        "symbol": [row.symbol for row in rows],
        "text": [row.text for row in rows],
        "label": [row.label for row in rows],
        "label_horizon": [row.label_horizon for row in rows],
        **{
            column: _lists([row.bars.get(column.removeprefix("bars.")) for row in rows])
            for column in schema.names
            if column.startswith("bars.")
        },
        **{
            column: [row.bar_words.get(column.removeprefix("words.")) for row in rows]
            for column in schema.names
            if column.startswith("words.")
        },
        "features.name": [list(row.features) for row in rows],
        "features.value": _lists([np.array(list(row.features.values()), dtype=np.float64) for row in rows]),
        "features.word_name": [list(row.feature_words) for row in rows],
        "features.word": [list(row.feature_words.values()) for row in rows],
        "unit": [row.position.unit for row in rows],
        "time_name": [row.position.time_name for row in rows],
        "indices": [list(row.position.indices) for row in rows],
        "numeric_times": [list(row.position.numeric_times) for row in rows],
    }
    for kind in ("time", "index"):
        intervals = [getattr(row.position, kind) for row in rows]
        for end in _ENDS:
            columns[f"{kind}.{end}"] = [None if interval is None else getattr(interval, end) for interval in intervals]
    return pa.record_batch([pa.array(columns[field.name], type=field.type) for field in schema], schema=schema)


def _lists(rows: Sequence[NDArray[np.float64] | None]) -> pa.ListArray:
    """One list of numbers per row, null for None."""
    lengths = [0 if row is None else len(row) for row in rows]
    present = [row for row in rows if row is not None]
    flat = np.concatenate(present) if present else np.empty(0)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    missing = pa.array([row is None for row in rows]) if len(present) < len(rows) else None
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat), mask=missing)


def _windows(batch: pa.RecordBatch, prefix: str) -> Iterator[Window]:
    names = batch.schema.names
    flat = {name: batch.column(name).to_pylist() for name in names if not name.startswith(_LISTED)}
    bars = {
        name.removeprefix("bars."): lists
        for name in names
        if name.startswith("bars.") and (lists := _arrays(batch.column(name))) is not None
    }
    words = {name.removeprefix("words."): flat[name] for name in names if name.startswith("words.")}
    features = _arrays(batch.column("features.value")) or []
    for n in range(len(batch)):
        intervals = [
            None if flat[f"{kind}.first"][n] is None else Interval(*(flat[f"{kind}.{end}"][n] for end in _ENDS))
            for kind in ("time", "index")
        ]
        values = features[n] if features else None
        yield Window(
            f"{prefix}{flat['line'][n]}",
            flat["id"][n],
            flat["label"][n],
            {name: column for name, lists in bars.items() if (column := lists[n]) is not None},
            {} if values is None else dict(zip(flat["features.name"][n], values.tolist(), strict=True)),
            text=flat["text"][n],
            bar_words={name: tuple(lists[n]) for name, lists in words.items() if lists[n] is not None},
            feature_words=dict(zip(flat["features.word_name"][n], flat["features.word"][n], strict=True)),
            symbol=flat["symbol"][n],
            label_horizon=flat["label_horizon"][n],
            position=WindowPosition(
                intervals[0],
                intervals[1],
                flat["unit"][n],
                flat["time_name"][n],
                indices=flat["indices"][n],
                numeric_times=flat["numeric_times"][n],
            ),
        )


def _arrays(column: pa.ListArray) -> list[NDArray[np.float64] | None] | None:
    """The numbers of each row, None for null; None instead of a list if all rows are null."""
    if column.null_count == len(column):
        return None
    values, offsets = column.values.to_numpy(zero_copy_only=True), column.offsets.to_numpy()
    is_valid_row = column.is_valid().to_pylist()
    return [
        values[start:stop] if is_valid else None
        for is_valid, start, stop in zip(is_valid_row, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    ]
