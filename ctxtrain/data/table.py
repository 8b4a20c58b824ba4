"""Windows as Arrow columns on disk: parsed once, read back as often as needed.

Comes in: windows, one after the other. Goes out: a `WindowTable`, whose columns are memory-mapped. It gives windows
again, all or chosen rows, without a copy of their numbers and without the file that they came from.

Columns, one entry a window:

    line                    its line in the file
    id, symbol, text        text, null where the window has none
    label                   index into `LABELS`, null without a label
    bars.NAME               float64 values of a field, oldest bar first; null where the window lacks the field
    features.name, .value   lists of equal length
    time.*, index.*         first, last and step of `Place`, null where the window says none
    unit, time_name, indices, counts    as in `Placed`

A table takes 8 bytes a number. `VERSION` rises when a row would be read otherwise, so that a table that was kept by an
earlier release is made again.
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

from ctxtrain.data.bar_order import Place, Placed
from ctxtrain.data.columns import temporary_disk
from ctxtrain.data.parse_window import BAR_FIELDS, Window

Ints = NDArray[np.int64]

VERSION = 1
ROWS_OF_A_BATCH = 256
_ENDS = ("first", "last", "step")
_NUMBERS = pa.list_(pa.float64())
SCHEMA = pa.schema(
    [
        ("line", pa.int64()),
        ("id", pa.string()),
        ("symbol", pa.string()),
        ("text", pa.string()),
        ("label", pa.int8()),
        *((f"bars.{name}", _NUMBERS) for name in BAR_FIELDS),
        ("features.name", pa.list_(pa.string())),
        ("features.value", _NUMBERS),
        *((f"{kind}.{end}", pa.int64()) for kind in ("time", "index") for end in _ENDS),
        ("unit", pa.string()),
        ("time_name", pa.string()),
        ("indices", pa.list_(pa.int64())),
        ("counts", pa.list_(pa.int64())),
    ]
)


class TableWriter:
    """Writes windows into a file, removed if the block ends without `finish`. Raises OSError if the disk is full.

    Without a `path` the file has no name, so the system removes it however the process ends.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._file: Any = tempfile.TemporaryFile() if path is None else path.open("x+b")  # noqa: SIM115  # __exit__ closes
        self._writer = pa.ipc.new_file(self._file, SCHEMA)
        self._windows: list[tuple[int, Window]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def add(self, line: int, window: Window) -> None:
        self._windows.append((line, window))
        if len(self._windows) == ROWS_OF_A_BATCH:
            self._write()

    def finish(self, path: Path | None = None) -> WindowTable:
        """The table of all windows; a file that has a name takes this one."""
        self._write()
        with self._disk():
            self._writer.close()
            self._file.flush()
            if self._path is not None and path is not None:
                self._path.replace(path)
        return WindowTable(self._file)

    def _write(self) -> None:
        if self._windows:
            with self._disk():
                self._writer.write_batch(_batch(self._windows))
            self._windows = []

    def _disk(self) -> AbstractContextManager[None]:
        return temporary_disk("a table of the rows") if self._path is None else nullcontext()


class WindowTable:
    """The windows of a file, from columns on disk. Rows are numbered from 0, in the order of the file."""

    def __init__(self, file: IO[bytes]) -> None:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # it outlives the file
        self._reader = pa.ipc.open_file(pa.py_buffer(mapped))
        batches = self._reader.num_record_batches
        last = len(self._reader.get_batch(batches - 1)) if batches else 0
        self._rows: int = max(0, batches - 1) * ROWS_OF_A_BATCH + last

    @classmethod
    def open(cls, path: Path) -> WindowTable:
        """Raises OSError or ValueError for a file that holds no whole table of this version."""
        with path.open("rb") as file:
            table = cls(file)
        if table._reader.schema != SCHEMA:
            raise ValueError("its columns are others")
        return table

    def __len__(self) -> int:
        return self._rows

    def windows(self, source: str, rows: Ints | None = None) -> Iterator[Window]:
        """The windows of these rows, in the order given, or of all; `source` is what their places begin with."""
        if rows is None:
            for number in range(self._reader.num_record_batches):
                yield from _windows(self._reader.get_batch(number), source)
            return
        for some in _runs(rows):
            number, first = divmod(int(some[0]), ROWS_OF_A_BATCH)
            batch = self._reader.get_batch(number)
            if len(some) == int(some[-1]) - int(some[0]) + 1:
                yield from _windows(batch.slice(first, len(some)), source)
            else:
                yield from _windows(batch.take(pa.array(some - number * ROWS_OF_A_BATCH)), source)

    def value(self, column: str, row: int) -> Any:
        """One value of a column, as Python has it."""
        number, place = divmod(row, ROWS_OF_A_BATCH)
        return self._reader.get_batch(number).column(column)[place].as_py()


def _runs(rows: Ints) -> Iterator[Ints]:
    """The rows in pieces, each of rising rows of one batch."""
    batch = rows // ROWS_OF_A_BATCH
    ends = np.flatnonzero((np.diff(batch) != 0) | (np.diff(rows) <= 0)) + 1
    yield from (piece for piece in np.split(rows, ends) if len(piece))


def _batch(windows: Sequence[tuple[int, Window]]) -> pa.RecordBatch:
    lines, rows = zip(*windows, strict=True)
    columns: dict[str, Any] = {
        "line": lines,
        "id": [row.id for row in rows],
        "symbol": [row.symbol for row in rows],
        "text": [row.text for row in rows],
        "label": [row.label for row in rows],
        **{f"bars.{name}": _lists([row.bars.get(name) for row in rows]) for name in BAR_FIELDS},
        "features.name": [list(row.features) for row in rows],
        "features.value": _lists([np.array(list(row.features.values()), dtype=np.float64) for row in rows]),
        "unit": [row.placed.unit for row in rows],
        "time_name": [row.placed.time_name for row in rows],
        "indices": [list(row.placed.indices) for row in rows],
        "counts": [list(row.placed.counts) for row in rows],
    }
    for kind in ("time", "index"):
        places = [getattr(row.placed, kind) for row in rows]
        for end in _ENDS:
            columns[f"{kind}.{end}"] = [None if place is None else getattr(place, end) for place in places]
    return pa.record_batch([pa.array(columns[field.name], type=field.type) for field in SCHEMA], schema=SCHEMA)


def _lists(rows: Sequence[NDArray[np.float64] | None]) -> pa.ListArray:
    """A list of numbers a row, null where there is None."""
    lengths = [0 if row is None else len(row) for row in rows]
    known = [row for row in rows if row is not None]
    flat = np.concatenate(known) if known else np.empty(0)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    missing = pa.array([row is None for row in rows]) if len(known) < len(rows) else None
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat), mask=missing)


def _windows(batch: pa.RecordBatch, source: str) -> Iterator[Window]:
    flat = {name: batch.column(name).to_pylist() for name in _plain_columns()}
    bars = {name: lists for name in BAR_FIELDS if (lists := _arrays(batch.column(f"bars.{name}"))) is not None}
    features = _arrays(batch.column("features.value")) or []
    for n in range(len(batch)):
        places = [
            None if flat[f"{kind}.first"][n] is None else Place(*(flat[f"{kind}.{end}"][n] for end in _ENDS))
            for kind in ("time", "index")
        ]
        values = features[n] if features else None
        yield Window(
            f"{source}:{flat['line'][n]}",
            flat["id"][n],
            flat["label"][n],
            {name: own for name, lists in bars.items() if (own := lists[n]) is not None},
            {} if values is None else dict(zip(flat["features.name"][n], values.tolist(), strict=True)),
            text=flat["text"][n],
            symbol=flat["symbol"][n],
            placed=Placed(
                places[0],
                places[1],
                flat["unit"][n],
                flat["time_name"][n],
                indices=flat["indices"][n],
                counts=flat["counts"][n],
            ),
        )


def _plain_columns() -> list[str]:
    return [name for name in SCHEMA.names if not name.startswith("bars.") and name != "features.value"]


def _arrays(column: pa.ListArray) -> list[NDArray[np.float64] | None] | None:
    """The numbers of each row, or None where it is null; None if every row is."""
    if column.null_count == len(column):
        return None
    values, offsets = column.values.to_numpy(zero_copy_only=True), column.offsets.to_numpy()
    known = column.is_valid().to_pylist()
    return [
        values[start:stop] if there else None
        for there, start, stop in zip(known, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    ]
