"""Standard output and standard error that survive write errors.

A closed terminal or pipe must not end a training run. So a write error is suppressed, and later output goes to
/dev/null. If the error lost a result on standard output, `raise_lost_write` raises it at the end of the process.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

_lost_writes: list[OSError] = []  # errors on standard output since the last `raise_lost_write`


class ResilientStream:
    """A text stream that suppresses write errors.

    With `results`, an error is recorded for `raise_lost_write`. A reader that closed the stream is not an error.
    """

    def __init__(self, stream: TextIO, *, results: bool) -> None:
        self._stream = stream
        self._results = results

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._suppress_write_errors():
            self._stream.write(text)
        return len(text)

    def write_bytes(self, content: bytes) -> None:
        with self._suppress_write_errors():
            self._stream.flush()
            self._stream.buffer.write(content)
            self._stream.buffer.flush()

    def flush(self) -> None:
        with self._suppress_write_errors():
            self._stream.flush()

    @contextmanager
    def _suppress_write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            number = self._stream.fileno()
            if self._results and not _is_reader_gone(error, number):
                _lost_writes.append(error)
            devnull = os.open(os.devnull, os.O_WRONLY)  # at exit, buffered text goes there without an error
            os.dup2(devnull, number)
            os.close(devnull)


def _is_reader_gone(error: OSError, number: int) -> bool:
    """Whether the other end closed the pipe or socket, or the terminal is gone."""
    hung_up = error.errno == errno.EIO and stat.S_ISCHR(os.fstat(number).st_mode)
    return hung_up or error.errno in (errno.EPIPE, errno.ECONNRESET)


def write_stdout(content: bytes | str) -> None:
    """Write a result to standard output. Raises OSError if standard output is closed."""
    if sys.stdout is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF), "standard output")
    stream = ResilientStream(sys.stdout, results=True)
    if isinstance(content, str):
        stream.write(content)
        stream.flush()
    else:
        stream.write_bytes(content)


def print_notice(line: str) -> None:
    """Print a line to standard output that is not a result, so that write errors are ignored."""
    print_line(sys.stdout, line)


def print_line(stream: TextIO | None, line: str) -> None:
    """Print a line to a stream at once; write errors are ignored, and so is a stream that is closed."""
    if stream is not None:
        resilient = ResilientStream(stream, results=False)
        resilient.write(f"{line}\n")
        resilient.flush()


def raise_lost_write() -> None:
    """Raise the first write error on standard output since the last call, if there was one."""
    if _lost_writes:
        error = _lost_writes[0]
        _lost_writes.clear()
        raise OSError(error.errno, error.strerror, "standard output")
