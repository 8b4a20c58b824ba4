"""Find the export of a model, without importing torch or transformers.

Input: a run folder, an export folder or a `final_model.zip`. Output: the export folder or the zip.
"""

from __future__ import annotations

from pathlib import Path

from ctxtrain.errors import ConfigError, DataError
from ctxtrain.storage.atomic_files import MANIFEST
from ctxtrain.storage.ownership import refuse_folder_of_runs

EXPORT_FOLDER = "export"


def find_export(path: Path) -> Path:
    """The export folder or zip of `path`. Raises ConfigError if there is no model, DataError if a file is not a zip."""
    if path.is_file():
        _require_zip(path)
        return path
    if not path.is_dir():
        raise ConfigError(f"{path}: no such model. Give a run folder, an export folder or a final_model.zip.")
    export = path / EXPORT_FOLDER
    if export.is_dir():
        return export
    if (path / "config.yaml").exists():
        raise ConfigError(f"{path}: this run has no export yet. Finish it with train --resume, or run export.")
    if not (path / MANIFEST).exists():
        refuse_folder_of_runs(path)
    return path


def _require_zip(path: Path) -> None:
    """Raise DataError for a file that is not a zip, for example when MODEL and DATA are swapped.

    A damaged file with the suffix .zip passes: `unpack` reports it better.
    """
    with path.open("rb") as stream:
        is_zip = stream.read(4) == b"PK\3\4"
    if not is_zip and path.suffix != ".zip":
        raise DataError(
            f"{path}: a model must be a run folder, an export folder or a final_model.zip, but this file is not a zip. "
            "Give MODEL first, then DATA."
        )
