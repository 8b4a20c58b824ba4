"""The format of a data file, detected from its content: JSON lines, a JSON array, Parquet or Arrow, plain, .gz or .zst.

Input: a stream of bytes. Output: rows with their numbers, as plain values. What is not read is named, with the remedy.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from typing import IO

import orjson

from ctxtrain.data.columns import temporary_disk
from ctxtrain.data.compression import CHUNK, damaged, named_packing, unpack
from ctxtrain.data.json_rows import array_rows, line_rows
from ctxtrain.data.parse_report import BARS_REMEDY, IN_FILE, NumberedRow, ParseReport
from ctxtrain.data.plain_values import Conversions
from ctxtrain.errors import DataError

FORMATS = "JSON lines, a JSON array, Parquet or Arrow (plain, .gz or .zst)"
_AGAIN = "Write its rows as JSON lines or Parquet"
_UNPACK = "Unpack it, or compress it by gzip or zstd"
_OTHER_FORMATS = {
    b"PK\3\4": f"a zip archive or an Excel file. Unpack it, or {_AGAIN[0].lower()}{_AGAIN[1:]}",
    b"PARE": f"an encrypted Parquet file. {_AGAIN}, without encryption",
    b"FEA1": f"a Feather file of version 1. {_AGAIN}",
    b"ORC": f"an ORC file. {_AGAIN}",
    b"Obj\1": f"an Avro file. {_AGAIN}",
    b"\x89HDF\r\n": f"an HDF5 file. {_AGAIN}",
    b"\x93NUMPY": f"a NumPy array. {_AGAIN}",
    b"\x80\x04": f"a pickle. {_AGAIN}",
    b"\x80\x05": f"a pickle. {_AGAIN}",
    b"\xfd7zXZ": f"compressed by xz. {_UNPACK}",
    b"BZh": f"compressed by bzip2. {_UNPACK}",
    b"7z\xbc\xaf\x27\x1c": f"a 7z archive. {_UNPACK}",
    b"\x04\x22\x4d\x18": f"compressed by lz4. {_UNPACK}",
    b"SQLite format 3": f"a SQLite database. {_AGAIN}",
    b"%PDF": f"a PDF document. {_AGAIN}",
    b"\xd0\xcf\x11\xe0": f"an old Excel file. {_AGAIN}",
    b"<!doctype": f"an HTML page. {_AGAIN}",
    b"<html": f"an HTML page. {_AGAIN}",
    b"<?xml": f"an XML document. {_AGAIN}",
}
_TAR, _TAR_AT = b"ustar", 257
_BAR_WORDS = frozenset(  # typical column names in a table of bars
    ["open", "high", "low", "close", "volume", "vol", "date", "time", "datetime", "timestamp", "o", "h", "l", "c"]
)
_ROW_WORDS = frozenset(["context_bars", "current_bar", "label", "context", "features"])
# [[1499040000000,"0.0163", …], …], or one bar per line
_BARS_AS_ARRAYS = re.compile(rb"\s*\[\s*(\[\s*)?(\"?-?[0-9][0-9.eE+-]*\"?\s*,\s*){4}")


class Format(Enum):
    """What a stream of rows holds."""

    LINES = "JSON lines"
    ARRAY = "JSON array"
    PARQUET = "Parquet"
    ARROW_FILE = "Arrow"
    ARROW_STREAM = "Arrow stream"


_ARROW_STARTS = {b"PAR1": Format.PARQUET, b"ARROW1": Format.ARROW_FILE, b"\xff\xff\xff\xff": Format.ARROW_STREAM}


def require_format(name: str, raw: IO[bytes]) -> None:
    """Raise DataError, with the remedy, if the first bytes of a stream are of a format that is not read, or damaged."""
    _detect(name, unpack(name, raw).start)


@contextmanager
def open_rows(
    name: str, raw: IO[bytes], report: ParseReport, file: IO[bytes] | None = None
) -> Iterator[Iterator[NumberedRow]]:
    """The rows of a stream, which is read to its end. `file` is the file below it, if it can be read again.

    `report` receives the kind of their places, and what was noticed about the format. Raises DataError, also while the
    rows are read, for a format that is not read and for damaged content.
    """
    unpacked = unpack(name, raw)
    kind = _detect(name, unpacked.start)
    if kind is not Format.LINES:
        report.separator = IN_FILE
    if kind in (Format.LINES, Format.ARRAY):
        yield line_rows(unpacked.stream, report.notices) if kind is Format.LINES else array_rows(unpacked.stream)
        _read_to_end(unpacked.stream, raw)
        return
    conversions = Conversions()
    with ExitStack() as stack:
        if file is None or unpacked.is_packed:
            file = stack.enter_context(_copy(unpacked.stream))
        version = _version(file)
        _read_to_end(unpacked.stream, raw)
        file.seek(0)
        yield _arrow_rows(name, file, kind, conversions)
        if _version(file) != version:  # then the digest may not be that of the rows
            raise DataError(f"{name}: the file was changed while it was read. Start again when it is complete.")
    report.notices.conversions = list(conversions.lines())


def _version(file: IO[bytes]) -> tuple[int, int]:
    state = os.fstat(file.fileno())
    return state.st_size, state.st_mtime_ns


def _read_to_end(*streams: IO[bytes]) -> None:
    """Find damage after the last row, and complete the digest of all bytes."""
    for stream in streams:
        while stream.read(CHUNK):
            pass


@contextmanager
def _copy(stream: IO[bytes]) -> Iterator[IO[bytes]]:
    """A temporary file with the bytes of a stream, which can be read from any place."""
    with tempfile.TemporaryFile() as file:
        while content := stream.read(CHUNK):
            with temporary_disk("a copy of the rows"):
                file.write(content)
        with temporary_disk("a copy of the rows"):
            file.flush()
        yield file


def _arrow_rows(name: str, file: IO[bytes], kind: Format, conversions: Conversions) -> Iterator[NumberedRow]:
    from ctxtrain.data.arrow_rows import ipc_rows, parquet_rows  # not at the top: pyarrow takes a while to import

    if kind is Format.PARQUET:
        return parquet_rows(name, file, conversions)
    return ipc_rows(name, file, conversions, is_stream=kind is Format.ARROW_STREAM)


def _detect(name: str, start: bytes) -> Format:
    """The format of unpacked bytes by the first of them. Raises DataError for a format that is not read."""
    if found := next((kind for mark, kind in _ARROW_STARTS.items() if start.startswith(mark)), None):
        return found
    if other := _detect_other_format(start):
        raise DataError(f"{name}: rows must be in {FORMATS}, but this is {other}.")
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start and text[:1] not in (b"{", b"[", b'"') and (packing := named_packing(name)):
        raise damaged(name, packing, "it does not begin like one")
    return Format.ARRAY if text.startswith(b"[") and not _is_line_of_lines(text) else Format.LINES


def _is_line_of_lines(text: bytes) -> bool:
    """Whether an array ends with its line and objects follow: a faulty row of JSON lines, and no array of rows."""
    line, _, more = text.partition(b"\n")
    if not any(other.lstrip().startswith(b"{") for other in more.split(b"\n")):
        return False
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True


def _detect_other_format(start: bytes) -> str | None:
    """A format that is not read, with the remedy, or None."""
    lines = (line.strip("\ufeff\0 \t\r") for line in start.decode("utf-8", "replace").lower().split("\n"))
    line = next((line for line in lines if line and not line.startswith(("#", "sep="))), "")
    words = max((line.split(mark) for mark in ";\t|,"), key=lambda columns: len(columns) > 2)
    words = [word.strip(" \"'<>") for word in words]
    column_names = _BAR_WORDS.intersection(word.partition(" ")[0] for word in words)
    is_json = line.startswith(("{", "[")) or (line.startswith('"') and line.count('"') < 3)
    if not is_json and (len(column_names) > 2 or sum(map(_is_number, words)) > 3):
        return f"a table with {len(words)} columns, like CSV. {BARS_REMEDY}"
    if not is_json and len(_ROW_WORDS.intersection(words)) > 1:
        return f"a table with {len(words)} columns, like CSV. {_AGAIN}"
    if _BARS_AS_ARRAYS.match(start):
        return f"arrays of numbers, like bars of an exchange. {BARS_REMEDY}"
    if start[_TAR_AT:].startswith(_TAR):
        return f"a tar archive. {_UNPACK}"
    return next((what for mark, what in _OTHER_FORMATS.items() if start.lower().startswith(mark.lower())), None)


def _is_number(word: str) -> bool:
    return bool(re.fullmatch(r"[-+]?\d+([.,:]\d+)*(e[-+]?\d+)?", word))
