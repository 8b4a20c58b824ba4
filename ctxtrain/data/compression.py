"""Streams of compressed files, unpacked while they are read.

Input: a stream of bytes, plain or compressed by gzip or zstd, whatever its name. Output: its first unpacked bytes, and
a stream of all of them. Damaged content raises DataError when it is reached.
"""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from ctxtrain.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer as Buffer

CHUNK = 1 << 17  # bytes per read
START = 4096  # bytes from which the format is detected
_PACKINGS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # first bytes of compressed data
_SUFFIXES = {".gz": "gzip", ".zst": "zstd"}


class Unpacked(NamedTuple):
    """The first unpacked bytes of a stream, and a stream of all of them, the first included."""

    start: bytes
    stream: IO[bytes]
    is_packed: bool


def unpack(name: str, raw: IO[bytes]) -> Unpacked:
    """Unpack a stream that may be compressed; `name` is the file's in messages."""
    start = raw.read(START)
    stream: IO[bytes] = io.BufferedReader(_Replayed(start, raw), CHUNK)
    is_packed = False
    while packing := _packing(start):
        is_packed = True
        stream = io.BufferedReader(_UnpackedFile(name, packing, stream), CHUNK)
        start = stream.read(START)
        stream = io.BufferedReader(_Replayed(start, stream), CHUNK)
    return Unpacked(start, stream, is_packed)


def named_packing(name: str) -> str | None:
    """The compression that the name of a file promises."""
    return _SUFFIXES.get(PurePosixPath(name).suffix.lower())


def damaged(name: str, kind: str, reason: object) -> DataError:
    return DataError(f"{name}: incomplete or damaged {kind} file ({reason}). Compress or copy it again.")


def _packing(start: bytes) -> str | None:
    return next((packing for mark, packing in _PACKINGS.items() if start.startswith(mark)), None)


def _open_packed(packing: str, stream: IO[bytes]) -> Any:
    if packing == "gzip":
        return gzip.GzipFile(fileobj=stream)
    import pyarrow as pa  # not at the top: the first look at the inputs of a command stays fast

    return pa.CompressedInputStream(stream, "zstd")


class _UnpackedFile(io.RawIOBase):
    """The unpacked bytes of a compressed stream."""

    def __init__(self, name: str, packing: str, stream: IO[bytes]) -> None:
        self._name = name
        self._packing = packing
        self._file = _open_packed(packing, stream)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer)
        try:
            content = self._file.read(len(view))
        except (EOFError, OSError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:  # the disk's
                raise
            raise damaged(self._name, self._packing, error) from None
        view[: len(content)] = content
        return len(content)


class _Replayed(io.RawIOBase):
    """Bytes that were read already, followed by the rest of their stream."""

    def __init__(self, start: bytes, rest: IO[bytes]) -> None:
        self._start = start
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer)
        content = self._start[: len(view)] or self._rest.read(len(view))
        self._start = self._start[len(view) :]
        view[: len(content)] = content
        return len(content)
