"""Cache of tables between runs, in a folder, indexed by the content of the original file.

Input: the SHA-256 of a file. Output: its table and its parse report, or None. A changed file has another SHA-256, so an
outdated table is never used.

Each table is two files: `HASH-labelled-vN.arrow`, with a hash of `data.fields` in its name if there are any, and a
`.json` of the same name that holds the SHA-256 of the first. A damaged or incomplete table is rebuilt. Nothing is ever
removed: you can delete the folder, or any table in it, whenever no run reads it.
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

from ctxtrain.data.row_schema import NO_FIELDS, OwnFields
from ctxtrain.data.table import VERSION, TableWriter, WindowTable
from ctxtrain.errors import ConfigError


class TableCache:
    """Tables in one folder, which is created if necessary. Raises ConfigError if the folder is not writable."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            scratch = self._scratch()
            scratch.touch()
            scratch.unlink()
        except OSError as error:
            raise ConfigError(
                f"data.cache must be a writable folder, got {self.folder}: {error.strerror}. "
                "Set another folder, or auto."
            ) from None

    def load(
        self, sha256: str, *, labelled: bool, own: OwnFields = NO_FIELDS
    ) -> tuple[WindowTable, dict[str, Any]] | None:
        """The table for a file's content and its stored parse report, or None if missing or damaged."""
        name = _name(sha256, labelled, own)
        path = self.folder / f"{name}.arrow"
        try:
            sidecar = orjson.loads((self.folder / f"{name}.json").read_bytes())
            with path.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != sidecar["sha256"]:
                    return None
            return WindowTable.open(path, own), dict(sidecar["reading"])
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowInvalid):
            return None

    @contextmanager
    def writer(self, own: OwnFields = NO_FIELDS) -> Iterator[TableWriter]:
        """A writer for `store`. Raises OSError, with the config key, if the disk is full."""
        with self._name_cache_folder(), TableWriter(self._scratch(), own) as writer:
            yield writer

    def store(
        self, writer: TableWriter, report: dict[str, Any], sha256: str, *, labelled: bool, own: OwnFields = NO_FIELDS
    ) -> WindowTable:
        """Finish a table and move it into place. Raises OSError as `writer` does."""
        name = _name(sha256, labelled, own)
        with self._name_cache_folder():
            table = writer.finish(self.folder / f"{name}.arrow")
            with (self.folder / f"{name}.arrow").open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            scratch = self._scratch()
            scratch.write_bytes(orjson.dumps({"sha256": digest, "reading": report}))
            scratch.replace(self.folder / f"{name}.json")
        return table

    def _scratch(self) -> Path:
        return self.folder / f".table-{secrets.token_hex(8)}"

    @contextmanager
    def _name_cache_folder(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = f"a table of the rows in data.cache={self.folder}"
            raise OSError(error.errno, error.strerror, where) from error


def _name(sha256: str, labelled: bool, own: OwnFields) -> str:
    """The name depends on everything that decides what is read from a file."""
    declared = f"-{hashlib.sha256(orjson.dumps(list(own.items()))).hexdigest()[:16]}" if own else ""
    return f"{sha256}-{'labelled' if labelled else 'unlabelled'}{declared}-v{VERSION}"
