"""Where rows come from: a file, a named pipe, a URL, standard input, or an object in memory.

Input: a path, a URL, or rows. Output: a `Source`, which gives its rows in one pass, with their numbers, and the SHA-256
of all of its bytes, or of the rows in memory.
"""

from __future__ import annotations

import hashlib
import io
import os
import select
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, cast

from ctxtrain.data.compression import CHUNK
from ctxtrain.data.formats import open_rows, require_format
from ctxtrain.data.memory_rows import canonical, memory_rows, require_rows
from ctxtrain.data.parse_report import IN_MEMORY, NumberedRow, ParseReport
from ctxtrain.data.plain_values import Conversions
from ctxtrain.data.remote_files import copy_of, require_driver
from ctxtrain.errors import DataError
from ctxtrain.urls import is_url, local_path, shown

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

    from _typeshed import WriteableBuffer as Buffer

WRITER_WAIT = 2000  # milliseconds until a pipe without a writer counts as empty


class Source(ABC):
    """Rows by one name, which messages use."""

    name: str

    @property
    def is_stored(self) -> bool:
        """Whether the rows can be read again, so that their SHA-256 is known before they are parsed."""
        return False

    @abstractmethod
    def open(self, report: ParseReport) -> AbstractContextManager[Iterator[NumberedRow]]:
        """One pass over the rows. At its end, `report` has the SHA-256, and what was noticed about the format.

        Raises DataError, also while the rows are read, if they cannot be read.
        """

    def sha256(self) -> str:
        """SHA-256 of a stored source."""
        raise NotImplementedError

    def release(self) -> None:  # noqa: B027  # most sources have nothing to release
        """Remove a temporary copy, which is made again if the rows are read again."""


class FileSource(Source):
    """A file, or a named pipe, which can be read once."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path

    @property
    def is_stored(self) -> bool:
        return self._path.is_file()

    @contextmanager
    def open(self, report: ParseReport) -> Iterator[Iterator[NumberedRow]]:
        with _open(self._path) as file, _open_hashed(self.name, file, report, can_seek=self.is_stored) as rows:
            yield rows

    def sha256(self) -> str:
        with _open(self._path) as file, io.BufferedReader(file) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def require_readable(self) -> None:
        """Raise DataError for a path that cannot hold rows: not a file or pipe, or recognisably another format."""
        path = self._path
        if not (path.is_file() or path.is_fifo()):
            raise DataError(f"{_missing_file_message(path)}. Give a file, such as rows.jsonl or rows.parquet.")
        if path.is_file():
            with path.open("rb") as file:
                require_format(self.name, file)


class UrlSource(Source):
    """A file at a URL, which is copied to a temporary file."""

    def __init__(self, url: str) -> None:
        self.name = shown(url)
        self._url = url
        self._copy: IO[bytes] | None = None

    @property
    def is_stored(self) -> bool:
        return True

    @contextmanager
    def open(self, report: ParseReport) -> Iterator[Iterator[NumberedRow]]:
        file = self._copied()
        with _open_hashed(self.name, cast("BinaryIO", file), report, can_seek=True) as rows:
            yield rows

    def sha256(self) -> str:
        digest = hashlib.file_digest(cast("BinaryIO", self._copied()), "sha256")  # type: ignore[arg-type]  # a file
        return digest.hexdigest()

    def release(self) -> None:
        if self._copy is not None:
            self._copy.close()
            self._copy = None

    def _copied(self) -> IO[bytes]:
        if self._copy is None:
            self._copy = copy_of(self._url)
            weakref.finalize(self, self._copy.close)
        self._copy.seek(0)
        return self._copy


class StandardInput(Source):
    """The rows on standard input, which can be read once."""

    def __init__(self) -> None:
        """Raises DataError if standard input is closed."""
        if sys.stdin is None or sys.stdin.closed:
            raise DataError("standard input is closed. Pipe the rows in, or give a file.")
        self.name = "standard input"
        self._stream = sys.stdin.buffer

    @contextmanager
    def open(self, report: ParseReport) -> Iterator[Iterator[NumberedRow]]:
        with _open_hashed(self.name, self._stream, report) as rows:
            yield rows


class MemorySource(Source):
    """Rows in memory: a list of dicts, a frame, a table, or another iterable of mappings, which is read once."""

    def __init__(self, rows: object, name: str) -> None:
        """`name` stands before the number of a row in messages. Raises DataError for an object without rows."""
        require_rows(rows)
        self.name = name
        self._rows = rows

    @contextmanager
    def open(self, report: ParseReport) -> Iterator[Iterator[NumberedRow]]:
        report.separator = IN_MEMORY
        digest, conversions = hashlib.sha256(), Conversions()

        def hashed() -> Iterator[NumberedRow]:
            for number, row in memory_rows(self.name, self._rows, conversions):
                digest.update(canonical(row))
                yield number, row

        yield hashed()
        report.sha256 = digest.hexdigest()
        report.notices.conversions = list(conversions.lines())


def open_source(given: object, name: str = "") -> Source:
    """The source of a path, a URL or rows in memory; `name` is that of the rows in messages."""
    if isinstance(given, Source):
        return given
    if isinstance(given, str) and is_url(given):
        path = local_path(given)
        return UrlSource(given) if path is None else FileSource(path)
    if isinstance(given, str | os.PathLike):
        path = Path(given)
        if not isinstance(given, str) and _was_url(path):
            url = str(path).replace(":/", "://", 1)
            raise DataError(f"{path}: a URL must be given as text, which a Path shortens. Pass {shown(url)!r}.")
        return FileSource(path)
    return MemorySource(given, name)


def _was_url(path: Path) -> bool:
    """Whether a path looks like a URL that lost a slash, and no such file exists."""
    return is_url(str(path).replace(":/", "://", 1)) and not path.exists()


def require_readable(given: str | Path) -> None:
    """Raise DataError for a path that cannot hold rows: not a file or pipe, or recognisably another format.

    Raises ConfigError for a URL that no installed package reads. Nothing is read from a URL.
    """
    source = open_source(given)
    if isinstance(source, FileSource):
        source.require_readable()
    elif isinstance(given, str):
        require_driver(given)


@contextmanager
def _open_hashed(
    name: str, file: io.FileIO | BinaryIO, report: ParseReport, *, can_seek: bool = False
) -> Iterator[Iterator[NumberedRow]]:
    """The rows of an open file; at the end, `report` has the SHA-256 of all of its bytes."""
    digest = hashlib.sha256()
    hashed = io.BufferedReader(_HashingFile(file, digest), CHUNK)
    with open_rows(name, hashed, report, cast("IO[bytes]", file) if can_seek else None) as rows:
        yield rows
    report.sha256 = digest.hexdigest()


class _HashingFile(io.RawIOBase):
    """A file that updates a digest with all bytes read from it."""

    def __init__(self, file: io.FileIO | BinaryIO, digest: Hash) -> None:
        self._file = file
        self._digest = digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        count = self._file.readinto(buffer) or 0  # type: ignore[union-attr]  # files in binary mode have it
        self._digest.update(memoryview(buffer)[:count])
        return count


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
