"""Where the export of a model is, found before anything heavy is imported.

Comes in: a run folder, an export folder or a `final_model.zip`. Goes out: the export folder or the zip.
"""

from __future__ import annotations

from pathlib import Path

from ctxtrain.errors import ConfigError, DataError
from ctxtrain.storage.atomic_files import MANIFEST
from ctxtrain.storage.ownership import refuse_several

EXPORT_FOLDER = "export"


def find_export(path: Path) -> Path:
    """Raises ConfigError if there is no model at the path, DataError for a file that is no zip."""
    if path.is_file():
        _refuse_other_file(path)
        return path
    if not path.is_dir():
        raise ConfigError(f"{path}: no such model. Give a run folder, an export folder or a final_model.zip.")
    inner = path / EXPORT_FOLDER
    if inner.is_dir():
        return inner
    if (path / "config.yaml").exists():
        raise ConfigError(f"{path}: this run has no export yet. Finish it with train --resume, or run export.")
    if not (path / MANIFEST).exists():
        refuse_several(path)
    return path


def _refuse_other_file(path: Path) -> None:
    """Raises DataError for a file that neither is nor claims to be a zip, as rows in the place of the model."""
    with path.open("rb") as stream:
        is_zip = stream.read(4) == b"PK\3\4"
    if not is_zip and path.suffix != ".zip":
        raise DataError(
            f"{path}: a model must be a run folder, an export folder or a final_model.zip, and this file is no zip. "
            "Give MODEL first, then DATA."
        )
