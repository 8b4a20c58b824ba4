"""Standard output and error: a reader that goes away costs nothing, and a result that a disk does not take is told.

A run goes on when nobody sees its progress. So a failure to write is noted here, the rest goes nowhere, and the process
says at its end, by `refuse_lost`, that its result was not written.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

_lost: list[OSError] = []  # of standard output, since the last look


class Lasting:
    """A text stream whose failures end nothing. With `results`, those that are no reader's going are kept in mind."""

    def __init__(self, stream: TextIO, *, results: bool) -> None:
        self._stream = stream
        self._results = results

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._kept():
            self._stream.write(text)
        return len(text)

    def write_bytes(self, content: bytes) -> None:
        with self._kept():
            self._stream.flush()
            self._stream.buffer.write(content)
            self._stream.buffer.flush()

    def flush(self) -> None:
        with self._kept():
            self._stream.flush()

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            number = self._stream.fileno()
            if self._results and not _reader_went(error, number):
                _lost.append(error)
            nowhere = os.open(os.devnull, os.O_WRONLY)  # also for what waits in the buffer until the process ends
            os.dup2(nowhere, number)
            os.close(nowhere)


def _reader_went(error: OSError, number: int) -> bool:
    """A pipe or a socket that is closed at the other end, or a terminal that is gone."""
    hung_up = error.errno == errno.EIO and stat.S_ISCHR(os.fstat(number).st_mode)
    return hung_up or error.errno in (errno.EPIPE, errno.ECONNRESET)


def write_out(content: bytes | str) -> None:
    """Write a result to standard output. Raises OSError if that is closed."""
    if sys.stdout is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF), "standard output")
    stream = Lasting(sys.stdout, results=True)
    if isinstance(content, str):
        stream.write(content)
        stream.flush()
    else:
        stream.write_bytes(content)


def tell(line: str) -> None:
    """Say something on standard output that is no result: if nobody can read it, nothing is lost."""
    if sys.stdout is not None:
        stream = Lasting(sys.stdout, results=False)
        stream.write(f"{line}\n")
        stream.flush()


def refuse_lost() -> None:
    """Raises the OSError, once, that a part of what was written to standard output since the last look met."""
    if _lost:
        error = _lost[0]
        _lost.clear()
        raise OSError(error.errno, error.strerror, "standard output")
