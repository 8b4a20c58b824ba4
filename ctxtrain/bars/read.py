"""A file of bars → its columns as they are in the file.

Input: a path. Output: a `Source`: an Arrow table with one column per field, and what was detected in the content. The
format is recognised by content, not by name: text with separators, Parquet, Feather or Arrow, JSON arrays of arrays,
JSON arrays of objects, or one JSON object per line; each plain, gzip or zstd. Cells of a text file stay text. Fields of
nested JSON objects have dotted names, such as `bar.volume_stats.total_volume`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import feather, ipc
from pyarrow import parquet as pq

from ctxtrain.bars.arrow_columns import plain_table
from ctxtrain.bars.json_bars import read_json
from ctxtrain.bars.separated import SeparatedText, parse_separated
from ctxtrain.errors import DataError
from ctxtrain.regular_files import read_regular

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_ARROW_STREAM = b"\xff\xff\xff\xff"
_REFUSED = {
    b"PK\x03\x04": ("a zip file (an .xlsx is one too)", "Unpack it, or save the sheet as CSV"),
    b"\xfd7zXZ": ("an xz file", "Unpack it with `unxz`"),
    b"BZh": ("a bzip2 file", "Unpack it with `bunzip2`"),
    b"7z\xbc\xaf": ("a 7z file", "Unpack it"),
    b"\xd0\xcf\x11\xe0": ("an .xls file", "Save the sheet as CSV"),
    b"\x89HDF": ("an HDF5 file", "Convert it to Parquet or CSV"),
    b"FEA1": ("a Feather file of version 1", "Write it again as Feather version 2 or Parquet"),
}


@dataclass(frozen=True)
class Source:
    """The columns of one file.

    `names` are those of the file, or `1`, `2`, … if it has none. `lines_T` holds the line of each row; it is empty if
    the rows have no lines. `kind` describes the format in words, `separator` is that of a text file.
    """

    path: Path
    sha256: str
    table: pa.Table
    kind: str
    has_names: bool = True
    separator: str = ""
    lines_T: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def names(self) -> list[str]:
        return list(self.table.column_names)

    def place(self, row: int) -> str:
        """`file:line` of a row, or the number of the row if it has no line."""
        if len(self.lines_T):
            return f"{self.path}:{self.lines_T[row]}"
        return f"{self.path}: row {row + 1}"


def read_source(path: Path, separator: str | None = None) -> Source:
    """Read one file. Raises DataError with every faulty line, or with what the file is instead."""
    try:
        raw = read_regular(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Give the path of a file of bars.") from None
    digest = hashlib.sha256(raw).hexdigest()
    content, packed = _unpack(path, raw)
    for magic, (what, remedy) in _REFUSED.items():
        if content.startswith(magic):
            raise DataError(f"{path}: bars must be in CSV, Parquet, Feather or JSON, got {what}. {remedy}.")
    if content.startswith(b"PAR1"):
        return Source(path, digest, _read_binary(path, content, pq.read_table), f"Parquet{packed}")
    if content.startswith(b"ARROW1"):
        return Source(path, digest, _read_binary(path, content, feather.read_table), f"Feather or Arrow{packed}")
    if content.startswith(_ARROW_STREAM):
        return Source(path, digest, _read_binary(path, content, _read_stream), f"an Arrow stream{packed}")
    text, encoding = _to_utf8(path, content)
    packed = encoding + packed
    start = text[:64].lstrip()[:1]
    if not start:
        raise DataError(f"{path}: the file has no bars; at least one is required.")
    if start in (b"[", b"{"):
        table, kind, has_names, lines_T = read_json(path, text)
        if not table.num_columns:
            raise DataError(f"{path}: the file has no bars; at least one is required.")
        return Source(path, digest, table, kind + packed, has_names, "", lines_T)
    parsed: SeparatedText = parse_separated(path, text, separator)
    return Source(path, digest, parsed.table, parsed.kind + packed, parsed.has_names, parsed.separator, parsed.lines_T)


def _unpack(path: Path, raw: bytes) -> tuple[bytes, str]:
    """The content, and the end of a description such as `, gzip`."""
    try:
        if raw.startswith(_GZIP):
            return gzip.decompress(raw), ", gzip"
        if raw.startswith(_ZSTD):
            with pa.input_stream(io.BytesIO(raw), compression="zstd") as stream:
                return stream.read(), ", zstd"
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: incomplete or damaged file ({error}). Compress or copy it again.") from None
    return raw, ""


def _read_binary(path: Path, content: bytes, read: Any) -> pa.Table:
    try:
        table = read(pa.BufferReader(content))
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: incomplete or damaged file ({reason}). Write or copy it again.") from None
    if not table.num_rows or not table.num_columns:
        raise DataError(f"{path}: the file has no bars; at least one is required.")
    return plain_table(path, table)


def _read_stream(buffer: pa.BufferReader) -> pa.Table:
    with ipc.open_stream(buffer) as stream:
        return stream.read_all()


def _to_utf8(path: Path, content: bytes) -> tuple[bytes, str]:
    """Text as UTF-8 without a mark, and the end of a description such as `, UTF-16`."""
    encoding = ""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif b"\0" in content[:100]:  # every second byte of Latin text in UTF-16
        encoding = "utf-16-le" if content[1:2] == b"\0" else "utf-16-be"
    try:
        if encoding:
            return content.decode(encoding).encode(), ", UTF-16"
        content = content.removeprefix(b"\xef\xbb\xbf")
        content.decode()
    except UnicodeDecodeError:
        if encoding or b"\0" in content:
            raise DataError(f"{path}: the file is neither text nor a known table. Export the bars as CSV.") from None
        return content.decode("cp1252", "replace").encode(), ", Windows-1252"
    return content, ""
