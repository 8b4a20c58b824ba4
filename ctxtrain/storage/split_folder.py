"""Checks whether the files of a folder of splits belong to ctxtrain and may be replaced, or are user data.

Input: a folder, the name of its card (`sample.json`, `windows.json`) and the rows that will be written next to it.
Output: nothing, or a ValueError before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ctxtrain.regular_files import non_regular_kind, read_regular
from ctxtrain.storage.atomic_files import sha256_file
from ctxtrain.storage.ownership import CARDS, owner_of
from ctxtrain.storage.validated import StoredModel, read_json_as


class _File(StoredModel):
    sha256: str


class _Facts(StoredModel):
    """The part of a card that identifies the files next to it."""

    arguments: dict[str, Any]
    files: dict[str, _File]


def require_split_folder(folder: Path, card: str, names: Iterable[str]) -> None:
    """Raise ValueError if new rows would replace files that are not those of an earlier command of this kind.

    Those may be replaced, because the card is enough to write them again. Raises DataError for a damaged card.
    """
    mark, kind = CARDS[card]
    if owner := owner_of(folder):
        raise ValueError(f"folder must not be inside {owner}, got {folder}. Use another folder.")
    places = {name: folder / f"{name}.jsonl" for name in names}
    for path in (folder / card, *places.values()):
        if (found := non_regular_kind(path)) or path.is_symlink():
            raise ValueError(f"{path} must be a {kind} file, but it is {found or 'a link'}. Use another folder.")
    known: dict[str, str] = {}
    if (folder / card).exists():
        if mark not in read_regular(folder / card):
            raise ValueError(f"{folder / card} must belong to a {kind}, but it does not. Use another folder.")
        facts = read_json_as(_Facts, folder / card, "Move it away together with its rows, or use another folder")
        known = {name: file.sha256 for name, file in facts.files.items()}
    others = [path.name for name, path in places.items() if path.exists() and sha256_file(path) != known.get(name)]
    if others:
        raise ValueError(
            f"folder must contain no rows except those of a {kind}, but {card} does not list the SHA-256 of "
            f"{', '.join(others)} in {folder}. Use another folder."
        )
