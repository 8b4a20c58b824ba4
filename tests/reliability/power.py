"""What a disk may hold after the power fails: POSIX promises only what was flushed.

Comes in: the calls that a program made, as calls.py records them. Goes out: folders that a legal crash leaves. Of a
file that was not flushed since, any part of the new bytes may be there, also as zeros; of a folder that was not
flushed since, any of the names made, moved or removed (Pillai et al. 2014, "All File Systems Are Not Created Equal").
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.reliability.calls import Calls


@dataclass
class File:
    flushed: bytes = b""
    written: bytes = b""  # after what was flushed

    def after_crash(self, luck: random.Random) -> bytes:
        kept = self.written[: luck.randint(0, len(self.written))]
        outcome = luck.choice(["nothing", "all", "part", "zeros", "part and zeros"])
        lost = b"\0" * len(self.written)
        return (
            self.flushed
            + {
                "nothing": b"",
                "all": self.written,
                "part": kept,
                "zeros": lost,
                "part and zeros": kept + lost[len(kept) :],
            }[outcome]
        )


@dataclass
class Folder:
    """Names as they were flushed, and the changes since: each takes one name away or points it at a file."""

    flushed: dict[str, File | None] = field(default_factory=dict)
    changes: list[dict[str, File | None]] = field(default_factory=list)

    def now(self) -> dict[str, File]:
        return self._with(self.changes)

    def after_crash(self, luck: random.Random) -> dict[str, File]:
        return self._with([change for change in self.changes if luck.random() < 0.5])

    def _with(self, changes: Sequence[dict[str, File | None]]) -> dict[str, File]:
        names = dict(self.flushed)
        for change in changes:
            names |= change
        return {name: file for name, file in names.items() if file}


class Recorded(Calls):
    """All calls below a folder, to be replayed up to any of them."""

    def __init__(self, root: Path) -> None:
        self.calls: list[tuple[str, str]] = []
        super().__init__(root, lambda _, kind, path: self.calls.append((kind, path)))

    def crash(self, at: int, luck: random.Random, target: Path) -> None:
        """Write into `target` what the disk may hold if the power fails after the first `at` calls."""
        folders: dict[str, Folder] = {self.root: Folder()}
        made: dict[str, bool] = {self.root: True}  # a folder whose own name is not flushed may be lost
        for (kind, path), detail in zip(self.calls[:at], self.details[:at], strict=True):
            self._replay(folders, made, kind, path, detail)
        lost = [path for path, flushed in made.items() if not flushed and luck.random() < 0.5]
        for path, folder in folders.items():
            if any(path == gone or path.startswith(f"{gone}/") for gone in lost):
                continue
            place = target / Path(path).relative_to(self.root)
            place.mkdir(parents=True, exist_ok=True)
            for name, file in folder.after_crash(luck).items():
                (place / name).write_bytes(file.after_crash(luck))

    def _replay(self, folders: dict[str, Folder], made: dict[str, bool], kind: str, path: str, detail: Any) -> None:
        place = Path(path)
        folder = folders[self.root if path == self.root else str(place.parent)]
        if kind == "mkdir":
            if path not in folders:
                folders[path], made[path] = Folder(), False
        elif kind == "create":
            if place.name not in folder.now():
                folder.changes.append({place.name: File()})
        elif kind in ("write", "half"):
            folder.now()[place.name].written += detail
        elif kind == "fsync" and path in folders:
            folders[path].flushed, folders[path].changes = dict(folders[path].now()), []
            made |= {child: True for child in made if str(Path(child).parent) == path}
        elif kind == "fsync":
            file = folder.now()[place.name]
            file.flushed, file.written = file.flushed + file.written, b""
        elif kind in ("replace", "rename"):
            assert Path(detail).parent == place.parent
            folder.changes.append({place.name: None, Path(detail).name: folder.now()[place.name]})
        elif kind in ("unlink", "remove"):
            folder.changes.append({place.name: None})
