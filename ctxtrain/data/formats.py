"""The format of a data file, told from its content: JSON lines, a JSON array, Parquet or Arrow, plain, .gz or .zst.

Input: a stream of bytes. Output: rows with their numbers, as plain values. What is not read is named, with the remedy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import IO

from ctxtrain.data.compression import CHUNK, damaged, named_packing, unpack
from ctxtrain.data.json_rows import array_rows, line_rows
from ctxtrain.data.parse_report import BARS_REMEDY, NumberedRow, ParseReport
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
_BARS_AS_ARRAYS = re.compile(rb"\s*\[\s*(\[\s*)?[-\"]?[0-9]")  # [[1499040000000,"0.0163", …], …], or one bar a line


class Format(Enum):
    """What a stream of rows holds; the value is its name in messages."""

    LINES = "JSON lines"
    ARRAY = "JSON array"


_ARROW_STARTS: dict[bytes, Format] = {}


def require_format(name: str, raw: IO[bytes]) -> None:
    """Raise DataError, with the remedy, if the first bytes of a stream are of a format that is not read, or damaged."""
    _detect(name, unpack(name, raw)[0])


@contextmanager
def open_rows(name: str, raw: IO[bytes], report: ParseReport) -> Iterator[Iterator[NumberedRow]]:
    """The rows of a stream, which is read to its end. `report` receives the kind of their places, and blank lines.

    Raises DataError, also while the rows are read, for a format that is not read and for damaged content.
    """
    start, stream = unpack(name, raw)
    if _detect(name, start) is Format.LINES:
        yield line_rows(stream, report.notices)
    else:
        report.separator = ":row "
        yield array_rows(stream)
    for rest in (stream, raw):  # for damage after the last row, and for the digest of all bytes
        while rest.read(CHUNK):
            pass


def _detect(name: str, start: bytes) -> Format:
    """The format of unpacked bytes by the first of them. Raises DataError for a format that is not read."""
    if found := next((kind for mark, kind in _ARROW_STARTS.items() if start.startswith(mark)), None):
        return found
    if other := _detect_other_format(start):
        raise DataError(f"{name}: rows must be in {FORMATS}, but this is {other}.")
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start and text[:1] not in (b"{", b"[", b'"') and (packing := named_packing(name)):
        raise damaged(name, packing, "it does not begin like one")
    return Format.ARRAY if text.startswith(b"[") else Format.LINES


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
