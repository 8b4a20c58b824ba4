"""A shim around the calls that change files: it counts them, and makes one of them fail, kill or signal.

It stands between Python and the system, where the package's own writes meet: os.open with O_CREAT, open for writing,
write, fsync, replace, rename, link, unlink, mkdir, rmdir below one folder. A write is two events, so that one can stop
it half way. What libraries write from compiled code passes below it; strace reaches that.
"""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar


class Calls:
    """`on_event(number, kind, path)` is called before each event; numbers start at 1.

    `details` gives for each event so far the bytes of a write, or the target of a rename or link.
    """

    KINDS: ClassVar = ("fsync", "replace", "rename", "link", "unlink", "remove", "mkdir", "rmdir")

    def __init__(self, root: Path, on_event: Callable[[int, str, str], None]) -> None:
        self.root = str(root.resolve())
        self.on_event = on_event
        self.count = 0
        self.details: list[Any] = []

    def event(self, kind: str, path: str, detail: Any = None) -> None:
        if path == self.root or path.startswith(f"{self.root}/"):
            self.count += 1
            self.details.append(detail)
            self.on_event(self.count, kind, path)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Patch os and open while the block runs."""
        before: list[tuple[Any, str, Any]] = [(io, "open", io.open), (builtins, "open", builtins.open)]
        before += [(os, name, getattr(os, name)) for name in (*self.KINDS, "open")]
        for name in self.KINDS:
            setattr(os, name, self._announced(name, getattr(os, name)))
        os.open = self._os_open(os.open)
        io.open = builtins.open = self._wrapping(io.open)
        try:
            yield
        finally:
            for module, name, function in before:
                setattr(module, name, function)

    def _announced(self, kind: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            target = os.fspath(args[1]) if kind in ("replace", "rename", "link") else None
            path = place(args[0], kwargs.get("dir_fd") or kwargs.get("src_dir_fd"))
            if kind != "mkdir" or not Path(path).exists():
                self.event(kind, path, target)
            return function(*args, **kwargs)

        return call

    def _os_open(self, function: Any) -> Any:
        def call(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if flags & os.O_CREAT:
                self.event("create", place(path, kwargs.get("dir_fd")))
            return function(path, flags, *args, **kwargs)

        return call

    def _wrapping(self, function: Any) -> Any:
        def call(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            path = place(file, None)
            if not (set(mode) & set("wax+")) or not path.startswith(self.root):
                return function(file, mode, *args, **kwargs)
            if not isinstance(file, int):
                self.event("create", path)
            return Stream(function(file, mode, *args, **kwargs), self, path)

        return call


class Stream:
    """An open file whose writes are two events: before the first byte, and half way."""

    def __init__(self, stream: Any, calls: Calls, path: str) -> None:
        self._stream, self._calls, self._path = stream, calls, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def write(self, content: Any) -> int:
        half = len(content) // 2
        self._calls.event("write", self._path, as_bytes(content[:half]))
        self._stream.write(content[:half])
        self._stream.flush()
        self._calls.event("half", self._path, as_bytes(content[half:]))
        self._stream.write(content[half:])
        return len(content)


def as_bytes(content: Any) -> bytes:
    return content.encode() if isinstance(content, str) else bytes(content)


def place(path: Any, folder: int | None) -> str:
    """The absolute path of a name, a descriptor, or a name in the folder of a descriptor."""
    if isinstance(path, int):
        return str(Path(f"/proc/self/fd/{path}").readlink())
    if folder is not None:
        return f"{place(folder, None)}/{os.fspath(path)}"
    return os.path.abspath(os.fspath(path))  # noqa: PTH100
