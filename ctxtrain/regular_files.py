"""Files that must be regular: a pipe, a socket, a device or a folder in the place of one is refused, never waited for.

Opening a named pipe waits until somebody writes to it, which may be never.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from ctxtrain.errors import DataError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NotRegular(DataError):
    """Something else than a regular file stands where one is read; `kind` says what."""

    def __init__(self, path: Path, kind: str) -> None:
        super().__init__(f"{path}: must be a regular file, and this is {kind}. Move it away or give another path.")
        self.kind = kind


def odd_kind(path: Path) -> str | None:
    """What stands at `path`, links followed, if it is there and no regular file."""
    try:
        mode = path.stat().st_mode
    except OSError:  # nothing is there, or nothing that can be looked at: opening it will say so
        return None
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no file")


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file to read bytes, without waiting. Raises NotRegular, and OSError as `open` does."""
    if kind := odd_kind(path):
        raise NotRegular(path, kind)
    stream = os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0)), "rb")
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):  # it has changed since it was looked at
        stream.close()
        raise NotRegular(path, "no regular file any more")
    return stream


def read_regular(path: Path) -> bytes:
    """All bytes of a file. Raises NotRegular, and OSError as `open` does."""
    with open_regular(path) as stream:
        return stream.read()


def refuse_special(paths: Iterable[Path]) -> None:
    """Raises NotRegular for the first path that is a pipe, a socket or a device; folders pass."""
    for path in paths:
        if (kind := odd_kind(path)) and not path.is_dir():
            raise NotRegular(path, kind)
