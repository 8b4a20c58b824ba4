"""Checks whether the files of a folder belong to a sample and may be replaced, or are user data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ctxtrain.regular_files import non_regular_kind, read_regular
from ctxtrain.storage.atomic_files import sha256_file
from ctxtrain.storage.ownership import SAMPLE, SAMPLE_MARK, owner_of
from ctxtrain.storage.validated import StoredModel, read_json_as


class _File(StoredModel):
    sha256: str


class _Facts(StoredModel):
    """The part of `sample.json` that identifies the files of a sample."""

    arguments: dict[str, Any]
    files: dict[str, _File]


def describe_sample(folder: Path, written: Mapping[str, Any]) -> str:
    """The files that `write_sample` wrote, one per line, and the best possible scores on them."""
    lines = [
        f"{folder / f'{name}.jsonl'}  {facts['rows']:,} windows  {facts['labels']}"
        for name, facts in written["files"].items()
    ]
    best = written["expected"]["best"]
    macro_f1 = "unknown" if best["macro_f1"] is None else f"{best['macro_f1']:.3f}"
    lines.append(f"best possible: accuracy {best['accuracy']:.3f}, macro-F1 {macro_f1}; see sample.json")
    return "".join(f"{line}\n" for line in lines)


def require_sample_folder(folder: Path, names: Iterable[str]) -> None:
    """Raise ValueError if a new sample would replace files that are not those of an earlier sample.

    An earlier sample may be replaced, because its `sample.json` is enough to write it again. Raises DataError for a
    damaged `sample.json`.
    """
    if owner := owner_of(folder):
        raise ValueError(f"folder must not be inside {owner}, got {folder}. Use another folder.")
    places = {name: folder / f"{name}.jsonl" for name in names}
    for path in (folder / SAMPLE, *places.values()):
        if (kind := non_regular_kind(path)) or path.is_symlink():
            raise ValueError(f"{path} must be a sample file, but it is {kind or 'a link'}. Use another folder.")
    known: dict[str, str] = {}
    if (folder / SAMPLE).exists():
        if SAMPLE_MARK not in read_regular(folder / SAMPLE):
            raise ValueError(f"{folder / SAMPLE} must belong to a sample, but it does not. Use another folder.")
        facts = read_json_as(_Facts, folder / SAMPLE, "Move it away together with its rows, or use another folder")
        known = {name: file.sha256 for name, file in facts.files.items()}
    others = [path.name for name, path in places.items() if path.exists() and sha256_file(path) != known.get(name)]
    if others:
        raise ValueError(
            f"folder must contain no rows except those of a sample, but {SAMPLE} does not list the SHA-256 of "
            f"{', '.join(others)} in {folder}. Use another folder."
        )
