"""Files of JSONL become windows, or faults.

Comes in: `.jsonl` or `.jsonl.gz`, one event a line. Goes out: a `Window` per good row, one after the other, and a
`Reading` with `file:line: reason` per fault; one pass finds all faults, and memory holds no window but the one at hand.
Blank lines are ignored.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import os
import select
import sys
import tempfile
import weakref
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import compress, repeat
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

import orjson

from ctxtrain.data import strict_json
from ctxtrain.data.notices import Noticed
from ctxtrain.data.schema import Window, parse_row, unread_fields
from ctxtrain.data.table import TableWriter, WindowTable
from ctxtrain.errors import MAX_FAULTS_SHOWN, DataError

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

    from _typeshed import WriteableBuffer as Buffer

WRITER_WAIT = 2000  # milliseconds for a pipe's writer to come
_CHUNK = 1 << 17  # bytes that are asked for at once
_GZIP = b"\x1f\x8b"  # how gzip data begins
_UTF16 = "the file is UTF-16 or UTF-32 text. Save it as UTF-8."
_NO_UTF8 = {  # how a file begins that is none
    codecs.BOM_UTF16_LE: _UTF16,
    codecs.BOM_UTF16_BE: _UTF16,
}


@dataclass
class Reading:
    """What one pass over a file found: `rows` = `good` windows + rows with faults."""

    source: str
    rows: int = 0
    good: int = 0
    faults: list[str] = field(default_factory=list)
    fault_total: int = 0
    ignored_fields: Counter[str] = field(default_factory=Counter)
    sha256: str = ""  # of the file's own bytes, also where they are packed
    noticed: Noticed = field(default_factory=Noticed)

    def add_faults(self, place: str, reasons: Sequence[str]) -> None:
        self.fault_total += len(reasons)
        room = MAX_FAULTS_SHOWN - len(self.faults)
        self.faults += [f"{place}: {reason}" for reason in reasons[:room]]

    def refuse_faults(self) -> None:
        """Raises DataError if there are any."""
        if self.faults:
            raise DataError(self.faults, total=self.fault_total)


class WindowFile:
    """The windows of one file, so that no file has to fit into memory.

    Rows with faults are left out; `reading` has what the last whole walk over the file found. With `keep`, the first
    walk writes a `WindowTable`, and later walks read that: a row is parsed once, a pipe can be walked again, and the
    file may change or go. `keep="lines"` keeps the lines too, for `raw_rows`. A walk raises DataError if the file
    cannot be read at all. `drop` leaves windows out of later walks.
    """

    def __init__(self, path: str | Path, *, labelled: bool = True, keep: bool | Literal["lines"] = False) -> None:
        self.path = Path(path)
        self.labelled = labelled
        self.reading = Reading(str(path))
        self.dropped = 0
        self._keep = keep
        self._copy: io.FileIO | None = None
        self._table: WindowTable | None = None
        self._kept: Iterable[bool] = repeat(True)

    def drop(self, rows: Sequence[int]) -> None:
        """Leave out these windows, by their number among those of the last walk."""
        gone = set(rows)
        self.dropped = len(gone)
        self._kept = [row not in gone for row in range(self.reading.good)] if gone else repeat(True)

    def __iter__(self) -> Iterator[Window]:
        return compress(self._parsed() if self._table is None else iter(self._table), self._kept)

    def _parsed(self) -> Iterator[Window]:
        reading = Reading(str(self.path))
        digest = hashlib.sha256()
        with TableWriter() if self._keep else nullcontext() as writer:
            with self._lines(digest) as lines:
                for window in parse_lines(lines, reading, labelled=self.labelled):
                    if writer:
                        writer.add(int(window.place.rpartition(":")[2]), window)
                    yield window
            reading.sha256 = digest.hexdigest()
            self.reading = reading
            if writer:
                self._table = writer.finish(str(self.path))

    def raw_rows(self) -> Iterator[bytes]:
        """The lines that hold rows, as they stand."""
        with self._lines(hashlib.sha256()) as lines:
            yield from (line for line in lines if not line.isspace())

    def sha256(self) -> str:
        """Of the file's own bytes, also where they are packed."""
        if not self.reading.sha256:
            digest = hashlib.sha256()
            with self._lines(digest):
                pass
            self.reading.sha256 = digest.hexdigest()
        return self.reading.sha256

    @contextmanager
    def _lines(self, digest: Hash) -> Iterator[Iterable[bytes]]:
        """The lines of the file, unpacked; `digest` sees all of its bytes, those after the end of gzip data too."""
        with ExitStack() as stack:
            copy: IO[bytes] | None = None
            if self._copy is not None:
                source = stack.enter_context(io.FileIO(os.dup(self._copy.fileno())))
                source.seek(0)
            else:
                source = stack.enter_context(_open(self.path))
                if self._keep == "lines":
                    copy = stack.enter_context(tempfile.TemporaryFile())
            stream = stack.enter_context(io.BufferedReader(_Watched(source, digest, copy), _CHUNK))
            try:
                packed = stream.peek(len(_GZIP)).startswith(_GZIP) or self.path.suffix.lower() == ".gz"
                yield stack.enter_context(gzip.open(stream)) if packed else stream
                while stream.read(_CHUNK):
                    pass
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise DataError(f"{self.path}: not a whole gzip file ({error}). Compress or copy it again.") from None
            if copy is not None:
                copy.flush()
                self._copy = io.FileIO(os.dup(copy.fileno()))
                weakref.finalize(self, self._copy.close)


class StandardInput:
    """The windows, labelled or not, of what is piped in, which can be walked through once."""

    def __init__(self) -> None:
        """Raises DataError if standard input is closed."""
        if sys.stdin is None or sys.stdin.closed:
            raise DataError("standard input: rows must be piped in, and it is closed. Pipe them in, or give a file.")
        self._lines = sys.stdin.buffer
        self.reading = Reading("standard input")

    def __iter__(self) -> Iterator[Window]:
        return parse_lines(self._lines, self.reading, labelled=False)


def load_windows(path: str | Path, *, labelled: bool = True) -> list[Window]:
    """All windows of a file at once. Raises DataError with the faults of every bad row."""
    file = WindowFile(path, labelled=labelled)
    windows = list(file)
    file.reading.refuse_faults()
    return windows


class _Watched(io.RawIOBase):
    """A file whose bytes go into a digest, and into a copy if there is one, as they are read."""

    def __init__(self, file: io.FileIO, digest: Hash, copy: IO[bytes] | None) -> None:
        self._file = file
        self._digest = digest
        self._copy = copy

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        count = self._file.readinto(buffer) or 0
        content = memoryview(buffer)[:count]
        self._digest.update(content)
        if self._copy is not None:
            try:
                self._copy.write(content)
            except OSError as error:
                where = f"a copy of the rows in {tempfile.gettempdir()}; TMPDIR names another folder"
                raise OSError(error.errno, error.strerror, where) from error
        return count


def _open(path: Path) -> io.FileIO:
    """A file or a pipe, for reading. A pipe that nothing writes to is empty after a while; a plain open would wait."""
    if not (path.is_file() or path.is_fifo()):
        raise DataError(f"{_no_file(path)}. Give the path of a .jsonl or .jsonl.gz file.")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if path.is_fifo():
        writer = select.poll()
        writer.register(descriptor, select.POLLIN)
        writer.poll(WRITER_WAIT)
    os.set_blocking(descriptor, True)
    return io.FileIO(descriptor)


def _no_file(path: Path) -> str:
    if path.is_dir():
        return f"{path}: rows must be in a file, and this is a folder"
    if path.exists():
        return f"{path}: rows must be in a file or a pipe, and this is a device or a socket"
    if str(path) == "-":
        return "-: rows must be in a file; of the commands only predict reads standard input"
    where = "" if path.is_absolute() else f" in {Path.cwd()}, from which relative paths count"
    return f"{path}: no such file{where}"


def _remedy(line: bytes, *, first: bool) -> str:
    if line.startswith(codecs.BOM_UTF8):
        return ". Save the file as UTF-8 without BOM."
    return ". A file holds one JSON object a line." if first and line.strip() in (b"{", b"[") else ""


def parse_lines(lines: Iterable[bytes], reading: Reading, *, labelled: bool) -> Iterator[Window]:
    """The windows of good rows, one after the other; `reading` is told of every row."""
    odd: dict[bool, str] = {}  # the first place of window rows and of text rows
    for number, line in enumerate(lines, start=1):
        if line.isspace():
            reading.noticed.blank_lines += 1
            continue
        reading.rows += 1
        place = f"{reading.source}:{number}"
        try:
            row = strict_json.loads(line.rstrip())  # or the end of a cut line would count as column 1
        except orjson.JSONDecodeError as error:
            unread = _NO_UTF8.get(line[:2]) if number == 1 else None
            reason = unread or error.msg + _remedy(line, first=reading.rows == 1)
            reading.add_faults(f"{place}:{error.colno}", [f"not valid JSON: {reason}"])
            if unread:  # every line would have the fault
                break
            continue
        window, reasons = parse_row(row, place, labelled=labelled)
        reading.add_faults(place, reasons)
        if window:
            reading.good += 1
            reading.ignored_fields.update(unread_fields(row, window))
            reading.noticed.see(window)
            odd.setdefault(window.text is None, place)
            yield window
    if not reading.rows:
        reading.add_faults(reading.source, ["the file has no rows; it needs at least one"])
    if len(odd) == 2:
        second = list(odd.values())[1]
        reading.add_faults(second, ["mixes text rows (context) with window rows (context_bars); use one shape"])
    if labelled and (fault := reading.noticed.unit_fault()):
        reading.add_faults(*fault)
