"""Lines of JSON become windows, or faults.

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
import re
import select
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from ctxtrain.data import strict_json
from ctxtrain.data.notices import Noticed
from ctxtrain.data.parse_window import Window, parse_row, unread_fields
from ctxtrain.errors import MAX_FAULTS_SHOWN, DataError

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

    from _typeshed import WriteableBuffer as Buffer

WRITER_WAIT = 2000  # milliseconds for a pipe's writer to come
_CHUNK = 1 << 17  # bytes that are asked for at once
_GZIP = b"\x1f\x8b"  # how gzip data begins
_START = 4096  # bytes that tell a format
_JSON = "Write its rows as JSON lines"
_OTHER_FORMATS = {
    b"PK\3\4": f"a zip archive or an Excel file. Unpack it, or {_JSON[0].lower()}{_JSON[1:]}",
    b"PAR1": f"a Parquet file. {_JSON}",
    b"ARROW1": f"an Arrow or Feather file. {_JSON}",
    b"\xfd7zXZ": "compressed by xz. Unpack it, or compress it by gzip",
    b"BZh": "compressed by bzip2. Unpack it, or compress it by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd. Unpack it, or compress it by gzip",
    b"SQLite format 3": f"a SQLite database. {_JSON}",
    b"%PDF": f"a PDF document. {_JSON}",
    b"\xd0\xcf\x11\xe0": f"an old Excel file. {_JSON}",
    b"<!doctype": f"a page of HTML. {_JSON}",
    b"<html": f"a page of HTML. {_JSON}",
    b"<?xml": f"an XML document. {_JSON}",
}
_BAR_WORDS = frozenset(  # in the header of a table of bars
    ["open", "high", "low", "close", "volume", "vol", "date", "time", "datetime", "timestamp", "o", "h", "l", "c"]
)
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

    def to_keep(self) -> dict[str, Any]:
        """What a kept table of faultless rows has beside it, as plain values."""
        return {
            "rows": self.rows,
            "good": self.good,
            "ignored_fields": dict(self.ignored_fields),
            "noticed": self.noticed.to_keep(),
        }

    @classmethod
    def kept(cls, found: Mapping[str, Any], source: str, sha256: str) -> Reading:
        """The inverse of `to_keep`. Raises KeyError or TypeError for anything else."""
        ignored, noticed = Counter(found["ignored_fields"]), Noticed.kept(found["noticed"])
        return cls(source, found["rows"], found["good"], ignored_fields=ignored, sha256=sha256, noticed=noticed)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with _open(path) as source:
        while content := source.read(_CHUNK):
            digest.update(content)
    return digest.hexdigest()


@contextmanager
def open_lines(path: Path, digest: Hash) -> Iterator[Iterable[bytes]]:
    """The lines of a file, decompressed; `digest` sees all of its bytes, those after the end of gzip data too."""
    with ExitStack() as stack:
        source = stack.enter_context(_open(path))
        stream = stack.enter_context(io.BufferedReader(_Watched(source, digest), _CHUNK))
        try:
            packed = stream.peek(len(_GZIP)).startswith(_GZIP) or path.suffix.lower() == ".gz"
            yield stack.enter_context(gzip.open(stream)) if packed else stream
            while stream.read(_CHUNK):
                pass
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path}: not a whole gzip file ({error}). Compress or copy it again.") from None


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


class _Watched(io.RawIOBase):
    """A file whose bytes go into a digest as they are read."""

    def __init__(self, file: io.FileIO, digest: Hash) -> None:
        self._file = file
        self._digest = digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        count = self._file.readinto(buffer) or 0
        self._digest.update(memoryview(buffer)[:count])
        return count


def refuse_unreadable(path: Path) -> None:
    """Raises DataError for a path that holds no rows of JSON: no file, or one of another format, found by its start."""
    if not (path.is_file() or path.is_fifo()):
        raise DataError(f"{_no_file(path)}. Give the path of a .jsonl or .jsonl.gz file.")
    if path.is_file() and (found := _other_format(_start_of(path))):
        raise DataError(f"{path}: rows must be JSON objects, one a line, and this is {found}.")


def _start_of(path: Path) -> bytes:
    """The first bytes of a file, decompressed where it is gzip."""
    with path.open("rb") as stream:
        start = stream.read(_START)
        if not start.startswith(_GZIP):
            return start
        try:
            return gzip.GzipFile(fileobj=io.BytesIO(start + stream.read(_START))).read1(_START)
        except (EOFError, OSError, zlib.error):  # whoever reads the whole file says so
            return b""


def _other_format(start: bytes) -> str | None:
    """What a file is that is no JSON, with the remedy."""
    lines = (line.strip("\ufeff\0 \t\r") for line in start.decode("utf-8", "replace").lower().split("\n"))
    line = next((line for line in lines if line and not line.startswith(("#", "sep="))), "")
    words = max((line.split(mark) for mark in ";\t|,"), key=lambda found: len(found) > 2)
    words = [word.strip(" \"'<>") for word in words]
    named = _BAR_WORDS.intersection(word.partition(" ")[0] for word in words)
    is_json = line.startswith(("{", "[")) or (line.startswith('"') and line.count('"') < 3)
    if not is_json and (len(named) > 2 or sum(map(_is_number, words)) > 3):
        return f"a table of {len(words)} columns, as CSV. Make windows of its bars: docs/own-windows.md has their rows"
    return next((what for mark, what in _OTHER_FORMATS.items() if start.lower().startswith(mark.lower())), None)


def _is_number(word: str) -> bool:
    return bool(re.fullmatch(r"[-+]?\d+([.,:]\d+)*(e[-+]?\d+)?", word))


def _open(path: Path) -> io.FileIO:
    """A file or a pipe, for reading. A pipe that nothing writes to is empty after a while; a plain open would wait."""
    refuse_unreadable(path)
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
