"""A folder that keeps tables of rows between runs, found by the content of the file that they were read from.

Comes in: the SHA-256 of a file. Goes out: its table and what was noticed about it, or nothing. A file that has changed
has another SHA-256, so it is never taken for the old one.

Each table is two files, `HASH-labelled-vN.arrow` and the same name with `.json`, which is written last. A table that is
not whole is made again. Nothing is removed: the folder, or any table in it, can be deleted whenever no run reads it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from ctxtrain.data.table import VERSION, TableWriter, WindowTable
from ctxtrain.errors import ConfigError


class TableCache:
    """Tables in one folder, made if it is missing. Raises ConfigError for a path that cannot be a folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"data.cache must be a folder that can be written to, and {self.folder} is not: {error.strerror}. "
                "Give another folder, or auto."
            ) from None

    def find(self, sha256: str, *, labelled: bool) -> tuple[WindowTable, dict[str, Any]] | None:
        """The table of a file's content with what stands beside it, or None if it is missing or damaged."""
        name = _name(sha256, labelled=labelled)
        try:
            beside = orjson.loads((self.folder / f"{name}.json").read_bytes())
            path = self.folder / f"{name}.arrow"
            if path.stat().st_size != beside["bytes"]:
                return None
            return WindowTable.open(path), beside["reading"]
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowInvalid):
            return None

    def writer(self) -> TableWriter:
        return TableWriter(self.folder)

    def keep(self, writer: TableWriter, reading: dict[str, Any], sha256: str, *, labelled: bool) -> WindowTable:
        """Finish a table and give it its names."""
        name = _name(sha256, labelled=labelled)
        path = self.folder / f"{name}.json"
        path.unlink(missing_ok=True)
        table = writer.finish(f"{name}.arrow")
        size = (self.folder / f"{name}.arrow").stat().st_size
        scratch = self.folder / f".{name}.{os.getpid()}.json"
        scratch.write_bytes(orjson.dumps({"bytes": size, "reading": reading}))
        scratch.replace(path)
        return table


def _name(sha256: str, *, labelled: bool) -> str:
    return f"{sha256}-{'labelled' if labelled else 'unlabelled'}-v{VERSION}"
