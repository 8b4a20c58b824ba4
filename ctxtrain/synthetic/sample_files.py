"""Whether the files of a folder are a sample's, which may be written anew, or anyone's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ctxtrain.regular_files import odd_kind, read_regular
from ctxtrain.storage.atomic_files import sha256_file
from ctxtrain.storage.ownership import SAMPLE, SAMPLE_MARK, owner_of
from ctxtrain.storage.validated import Part, read_as


class _File(Part):
    sha256: str


class _Facts(Part):
    """What tells the files of a sample from anyone's own."""

    arguments: dict[str, Any]
    files: dict[str, _File]


def described(folder: Path, written: Mapping[str, Any]) -> str:
    """What `write_sample` wrote, a line a file, and the best that a model could score on it."""
    lines = [
        f"{folder / f'{name}.jsonl'}  {facts['rows']:,} windows  {facts['labels']}"
        for name, facts in written["files"].items()
    ]
    best = written["expected"]["best"]
    macro_f1 = "unknown" if best["macro_f1"] is None else f"{best['macro_f1']:.3f}"
    lines.append(f"best possible: accuracy {best['accuracy']:.3f}, macro-F1 {macro_f1}; see sample.json")
    return "".join(f"{line}\n" for line in lines)


def refuse_others_files(folder: Path, names: Iterable[str]) -> None:
    """A sample may take the place of a sample, which its `sample.json` makes again, but of nothing else.

    Raises ValueError, and DataError for a `sample.json` that is a damaged one.
    """
    if owner := owner_of(folder):
        raise ValueError(f"folder must not lie in {owner}, got {folder}. Give another folder.")
    places = {name: folder / f"{name}.jsonl" for name in names}
    for path in (folder / SAMPLE, *places.values()):
        if (kind := odd_kind(path)) or path.is_symlink():
            raise ValueError(f"{path} must be a file of a sample, and it is {kind or 'a link'}. Give another folder.")
    known: dict[str, str] = {}
    if (folder / SAMPLE).exists():
        if SAMPLE_MARK not in read_regular(folder / SAMPLE):
            raise ValueError(f"{folder / SAMPLE} must be that of a sample, and it is not. Give another folder.")
        facts = read_as(_Facts, folder / SAMPLE, "Move it away with the rows beside it, or give another folder")
        known = {name: file.sha256 for name, file in facts.files.items()}
    others = [path.name for name, path in places.items() if path.exists() and sha256_file(path) != known.get(name)]
    if others:
        raise ValueError(
            f"folder must hold no rows but those of a sample, got {', '.join(others)} in {folder} without "
            f"a {SAMPLE} that has their SHA-256. Give another folder."
        )
