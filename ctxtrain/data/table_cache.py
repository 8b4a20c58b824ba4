"""A folder that keeps tables of rows between runs, found by the content of the file that they were read from.

Comes in: the SHA-256 of a file. Goes out: its table and what was noticed about it, or nothing. A file that has changed
has another SHA-256, so it is never taken for the old one.

Each table is two files, `HASH-labelled-vN.arrow` and the same name with `.json`, which has the SHA-256 of the first. A
table that is damaged, or not whole, is made again. Nothing is removed: the folder, or any table in it, can be deleted
whenever no run reads it.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from ctxtrain.data.table import VERSION, TableWriter, WindowTable
from ctxtrain.errors import ConfigError


class TableCache:
    """Tables in one folder, made if it is missing. Raises ConfigError for a path where no file can be written."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            scratch = self._scratch()
            scratch.touch()
            scratch.unlink()
        except OSError as error:
            raise ConfigError(
                f"data.cache must be a folder that can be written to, and {self.folder} is not: {error.strerror}. "
                "Give another folder, or auto."
            ) from None

    def find(self, sha256: str, *, labelled: bool) -> tuple[WindowTable, dict[str, Any]] | None:
        """The table of a file's content with what stands beside it, or None if it is missing or damaged."""
        name = _name(sha256, labelled=labelled)
        path = self.folder / f"{name}.arrow"
        try:
            beside = orjson.loads((self.folder / f"{name}.json").read_bytes())
            with path.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != beside["sha256"]:
                    return None
            return WindowTable.open(path), dict(beside["reading"])
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowInvalid):
            return None

    @contextmanager
    def writer(self) -> Iterator[TableWriter]:
        """A writer for `keep`. Raises OSError, with the key, if the disk takes no more."""
        with self._named(), TableWriter(self._scratch()) as writer:
            yield writer

    def keep(self, writer: TableWriter, reading: dict[str, Any], sha256: str, *, labelled: bool) -> WindowTable:
        """Finish a table and give it its names. Raises as `writer` does."""
        name = _name(sha256, labelled=labelled)
        with self._named():
            table = writer.finish(self.folder / f"{name}.arrow")
            with (self.folder / f"{name}.arrow").open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            scratch = self._scratch()
            scratch.write_bytes(orjson.dumps({"sha256": digest, "reading": reading}))
            scratch.replace(self.folder / f"{name}.json")
        return table

    def _scratch(self) -> Path:
        return self.folder / f".table-{secrets.token_hex(8)}"

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = f"a table of the rows in data.cache={self.folder}"
            raise OSError(error.errno, error.strerror, where) from error


def _name(sha256: str, *, labelled: bool) -> str:
    return f"{sha256}-{'labelled' if labelled else 'unlabelled'}-v{VERSION}"
