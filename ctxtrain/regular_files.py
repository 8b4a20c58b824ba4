"""Open and read regular files only.

A pipe, socket, device or folder raises NotRegularFile. Plain `open` would block on a named pipe until another process
opens the pipe for writing, possibly forever.
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


class NotRegularFile(DataError):
    """The path of an input is not a regular file. `kind` says what it is instead, such as "a folder"."""

    def __init__(self, path: Path, kind: str) -> None:
        super().__init__(f"{path}: must be a regular file, got {kind}. Move it away or give another path.")
        self.kind = kind


def non_regular_kind(path: Path) -> str | None:
    """The kind of a path that is not a regular file, such as "a folder"; None for a regular or a missing file.

    Symbolic links are followed.
    """
    try:
        mode = path.stat().st_mode
    except OSError:  # missing or inaccessible: the caller gets the error when it opens the path
        return None
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "a special file")


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file for reading in binary mode without blocking. Raises NotRegularFile, and OSError as `open` does."""
    if kind := non_regular_kind(path):
        raise NotRegularFile(path, kind)
    stream = os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0)), "rb")
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):  # the path was replaced after the check
        stream.close()
        raise NotRegularFile(path, "a file that was replaced while it was opened")
    return stream


def read_regular(path: Path) -> bytes:
    """Read all bytes of a file. Raises NotRegularFile, and OSError as `open` does."""
    with open_regular(path) as stream:
        return stream.read()


def refuse_special(paths: Iterable[Path]) -> None:
    """Raise NotRegularFile for the first path that is a pipe, a socket or a device; folders are allowed."""
    for path in paths:
        if (kind := non_regular_kind(path)) and not path.is_dir():
            raise NotRegularFile(path, kind)
