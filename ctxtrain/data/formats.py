"""JSON lines → windows or faults.

Input: `.jsonl` or `.jsonl.gz`, one event per line. Output: a `Window` per valid row, as an iterator, and a
`ParseReport` with `file:line: reason` per fault. One pass finds all faults and holds only the current window in memory.
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
from ctxtrain.data.notices import Notices
from ctxtrain.data.parse_window import Kind, Window, parse_row
from ctxtrain.data.row_schema import NO_FIELDS, OwnFields
from ctxtrain.errors import MAX_FAULTS_SHOWN, DataError

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

    from _typeshed import WriteableBuffer as Buffer

WRITER_WAIT = 2000  # milliseconds until a pipe without a writer counts as empty
_CHUNK = 1 << 17  # bytes per read
_GZIP = b"\x1f\x8b"  # first bytes of gzip data
_START = 4096  # bytes read to detect the format
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
    b"<!doctype": f"an HTML page. {_JSON}",
    b"<html": f"an HTML page. {_JSON}",
    b"<?xml": f"an XML document. {_JSON}",
}
_BAR_WORDS = frozenset(  # typical column names in a table of bars
    ["open", "high", "low", "close", "volume", "vol", "date", "time", "datetime", "timestamp", "o", "h", "l", "c"]
)
_ROWS_OF_KIND: dict[Kind, str] = {
    "window": "window rows (context_bars)",
    "features": "rows of features without bars",
    "text": "text rows (context)",
}
_UTF16_REASON = "the file is UTF-16 or UTF-32 text. Save it as UTF-8."
_UTF16_MARKS = {  # byte order marks of files that are not UTF-8
    codecs.BOM_UTF16_LE: _UTF16_REASON,
    codecs.BOM_UTF16_BE: _UTF16_REASON,
}


MAX_ROWS_PER_KIND = 10  # of faults that are alike: with one in every row, no other would be seen
MAX_KINDS = 1_000
_FEATURE = re.compile(r"^features\.\S+")
_BAR = re.compile(r"\b(context_bars\[\d+\]|current_bar)")


def _without_bar(reason: str) -> str:
    """A reason without the bar and the value: equal for the bars of a row with one fault."""
    return _BAR.sub("a bar", reason).partition(", got ")[0]


@dataclass
class ParseReport:
    """Result of one pass over a file: `rows` = `good` windows + rows with faults."""

    source: str
    rows: int = 0
    good: int = 0
    faults: list[str] = field(default_factory=list)
    fault_total: int = 0
    hidden: Counter[str] = field(default_factory=Counter)  # faults by kind that are not among `faults`
    _kinds: Counter[str] = field(default_factory=Counter)
    ignored_fields: Counter[str] = field(default_factory=Counter)
    sha256: str = ""  # of the file as stored, compressed or not
    notices: Notices = field(default_factory=Notices)

    def add_faults(self, place: str, reasons: Sequence[str]) -> None:
        """Add the faults of a row. Of each kind the first rows are listed, and the others counted."""
        of_row: dict[str, list[str]] = {}
        for reason in reasons:
            of_row.setdefault(_without_bar(reason), []).append(reason)
        for name, bars in of_row.items():
            kind = _FEATURE.sub("a feature", name)
            if kind not in self._kinds and len(self._kinds) >= MAX_KINDS:
                kind = "other faults"
            self.fault_total += 1
            self._kinds[kind] += 1
            if self._kinds[kind] <= MAX_ROWS_PER_KIND and len(self.faults) < MAX_FAULTS_SHOWN:
                others = len(bars) - 1
                more = f" (and {others} more bar{'' if others == 1 else 's'} of the row)" if others else ""
                self.faults.append(f"{place}: {bars[0]}{more}")
            else:
                self.hidden[kind] += 1

    def refuse_faults(self) -> None:
        """Raise DataError if there are faults."""
        if self.faults:
            raise DataError(self.faults, total=self.fault_total, hidden=self.hidden)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that are stored beside the cached table of a file without faults."""
        return {
            "rows": self.rows,
            "good": self.good,
            "ignored_fields": dict(self.ignored_fields),
            "noticed": self.notices.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str, sha256: str) -> ParseReport:
        """Inverse of `to_dict`. Raises KeyError or TypeError for other values."""
        ignored, notices = Counter(values["ignored_fields"]), Notices.from_dict(values["noticed"])
        return cls(source, values["rows"], values["good"], ignored_fields=ignored, sha256=sha256, notices=notices)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with _open(path) as source:
        while content := source.read(_CHUNK):
            digest.update(content)
    return digest.hexdigest()


@contextmanager
def open_lines(path: Path, digest: Hash) -> Iterator[Iterable[bytes]]:
    """The lines of a file, decompressed. `digest` hashes all of its bytes, including any after the end of gzip data."""
    with ExitStack() as stack:
        source = stack.enter_context(_open(path))
        stream = stack.enter_context(io.BufferedReader(_HashingFile(source, digest), _CHUNK))
        try:
            packed = stream.peek(len(_GZIP)).startswith(_GZIP) or path.suffix.lower() == ".gz"
            yield stack.enter_context(gzip.open(stream)) if packed else stream
            while stream.read(_CHUNK):
                pass
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path}: incomplete or damaged gzip file ({error}). Compress or copy it again.") from None


class StandardInput:
    """The windows on standard input, labelled or not. They can be iterated only once."""

    def __init__(self, own: OwnFields = NO_FIELDS) -> None:
        """Raises DataError if standard input is closed."""
        self._own = own
        if sys.stdin is None or sys.stdin.closed:
            raise DataError("standard input is closed. Pipe the rows in, or give a file.")
        self._lines = sys.stdin.buffer
        self.report = ParseReport("standard input")

    def __iter__(self) -> Iterator[Window]:
        return parse_lines(self._lines, self.report, labelled=False, own=self._own)


class _HashingFile(io.RawIOBase):
    """A file that updates a digest with all bytes read from it."""

    def __init__(self, file: io.FileIO, digest: Hash) -> None:
        self._file = file
        self._digest = digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        count = self._file.readinto(buffer) or 0
        self._digest.update(memoryview(buffer)[:count])
        return count


def require_readable(path: Path) -> None:
    """Raise DataError for a path that cannot hold JSON rows: not a file or pipe, or recognisably another format."""
    if not (path.is_file() or path.is_fifo()):
        raise DataError(f"{_missing_file_message(path)}. Give the path of a .jsonl or .jsonl.gz file.")
    if path.is_file() and (other_format := _detect_other_format(_read_start(path))):
        raise DataError(f"{path}: rows must be JSON objects, one per line, but this is {other_format}.")


def _read_start(path: Path) -> bytes:
    """The first bytes of a file, decompressed if it is gzip."""
    with path.open("rb") as stream:
        start = stream.read(_START)
        if not start.startswith(_GZIP):
            return start
        try:
            return gzip.GzipFile(fileobj=io.BytesIO(start + stream.read(_START))).read1(_START)
        except (EOFError, OSError, zlib.error):  # reported when the whole file is read
            return b""


def _detect_other_format(start: bytes) -> str | None:
    """The format of a file that is not JSON, with the remedy, or None."""
    lines = (line.strip("\ufeff\0 \t\r") for line in start.decode("utf-8", "replace").lower().split("\n"))
    line = next((line for line in lines if line and not line.startswith(("#", "sep="))), "")
    words = max((line.split(mark) for mark in ";\t|,"), key=lambda columns: len(columns) > 2)
    words = [word.strip(" \"'<>") for word in words]
    column_names = _BAR_WORDS.intersection(word.partition(" ")[0] for word in words)
    is_json = line.startswith(("{", "[")) or (line.startswith('"') and line.count('"') < 3)
    if not is_json and (len(column_names) > 2 or sum(map(_is_number, words)) > 3):
        return f"a table with {len(words)} columns, like CSV. Convert its bars to windows (docs/own-windows.md)"
    return next((what for mark, what in _OTHER_FORMATS.items() if start.lower().startswith(mark.lower())), None)


def _is_number(word: str) -> bool:
    return bool(re.fullmatch(r"[-+]?\d+([.,:]\d+)*(e[-+]?\d+)?", word))


def _open(path: Path) -> io.FileIO:
    """Open a file or pipe for reading. After a timeout, a pipe without a writer is empty; a plain open would block."""
    require_readable(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if path.is_fifo():
        writer = select.poll()
        writer.register(descriptor, select.POLLIN)
        writer.poll(WRITER_WAIT)
    os.set_blocking(descriptor, True)
    return io.FileIO(descriptor)


def _missing_file_message(path: Path) -> str:
    if path.is_dir():
        return f"{path}: rows must be in a file, but this is a folder"
    if path.exists():
        return f"{path}: rows must be in a file or a pipe, but this is a device or a socket"
    if str(path) == "-":
        return "-: only predict reads rows from standard input"
    where = "" if path.is_absolute() else f" in {Path.cwd()}, the current folder"
    return f"{path}: no such file{where}"


def _remedy(line: bytes, *, first: bool) -> str:
    if line.startswith(codecs.BOM_UTF8):
        return ". Save the file as UTF-8 without BOM."
    return ". A file has one JSON object per line." if first and line.strip() in (b"{", b"[") else ""


def parse_lines(
    lines: Iterable[bytes], report: ParseReport, *, labelled: bool, own: OwnFields = NO_FIELDS
) -> Iterator[Window]:
    """Yield the windows of valid rows; `report` collects every row's faults and notices."""
    first_of_kind: dict[Kind, str] = {}  # location of the first row of each kind
    for number, line in enumerate(lines, start=1):
        if line.isspace():
            report.notices.blank_lines += 1
            continue
        report.rows += 1
        place = f"{report.source}:{number}"
        try:
            row = strict_json.loads(line.rstrip())  # with its newline, a truncated line would fail at column 1
        except orjson.JSONDecodeError as error:
            encoding_fault = _UTF16_MARKS.get(line[:2]) if number == 1 else None
            reason = encoding_fault or error.msg + _remedy(line, first=report.rows == 1)
            report.add_faults(f"{place}:{error.colno}", [f"not valid JSON: {reason}"])
            if encoding_fault:  # every line would have this fault
                break
            continue
        window, reasons = parse_row(row, place, labelled=labelled, own=own)
        report.add_faults(place, reasons)
        if window:
            report.good += 1
            report.ignored_fields.update(window.unread)
            report.notices.add(window)
            first_of_kind.setdefault(window.kind, place)
            yield window
    if not report.rows:
        report.add_faults(report.source, ["the file has no rows; at least one is required"])
    if len(first_of_kind) > 1:
        (_, _), (_, second), *_ = first_of_kind.items()
        mixed = " and ".join(_ROWS_OF_KIND[kind] for kind in first_of_kind)
        report.add_faults(second, [f"mixes {mixed}; a file must have one kind of row"])
    if labelled:
        for fault in report.notices.file_faults():
            report.add_faults(*fault)
