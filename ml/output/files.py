"""Files that appear whole or not at all, their hashes, and the zip.

A file is written under another name in the same folder, flushed to the disk, renamed into place, and the folder is
flushed too; so a name always shows either the old content or the new one, also after a crash or a power cut.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from ml.errors import DataError

MANIFEST = "manifest.json"
_SAFE_NAME = re.compile(r"(adapter/)?[A-Za-z0-9_][A-Za-z0-9_.-]*")
_ZIP_EPOCH = (
    1980,
    1,
    1,
    0,
    0,
    0,
)  # the earliest date a zip can hold; one date makes equal inputs equal bytes
_CHUNK = 1 << 20


class ManifestEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    sha256: str
    bytes: int


class Manifest(BaseModel):
    """Every file of an export but the manifest itself."""

    model_config = ConfigDict(extra="forbid", strict=True)

    files: dict[str, ManifestEntry]


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a stream whose content takes the place of `path` when the block ends well, and vanishes when it does not."""
    descriptor, scratch_name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    scratch = Path(scratch_name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        scratch.chmod(0o644)
        scratch.replace(path)
        sync_folder(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    with replacing(path) as stream:
        stream.write(content)


def write_json(path: Path, value: object) -> None:
    write_bytes(path, to_json(value))


def to_json(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def share_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source` where the file system can link, else a copy; none is written into."""
    scratch = target.with_name(f".{target.name}.tmp")
    scratch.unlink(missing_ok=True)
    try:
        os.link(source, scratch)
    except OSError:
        shutil.copyfile(source, scratch)
    scratch.replace(target)
    sync_folder(target.parent)


def sha256_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def write_manifest(folder: Path) -> None:
    entries = {
        name: {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size}
        for name in files_below(folder)
        if name != MANIFEST
    }
    write_json(folder / MANIFEST, {"files": entries})


def check_manifest(folder: Path) -> None:
    """Raises DataError that names every file of an export that is missing, changed or not listed."""
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"{folder}: not an export, it has no {MANIFEST}. Give a folder or zip made by export."
        ) from None
    except ValidationError as error:
        raise DataError(f"{folder / MANIFEST}: not a manifest ({error.error_count()} faults). Export again.") from None
    found = {name for name in files_below(folder) if name != MANIFEST}
    faults = [f"{folder / name}: listed in {MANIFEST} but missing" for name in sorted(manifest.files.keys() - found)]
    faults += [f"{folder / name}: not listed in {MANIFEST}" for name in sorted(found - manifest.files.keys())]
    for name in sorted(found & manifest.files.keys()):
        digest = sha256_file(folder / name)
        if digest != manifest.files[name].sha256:
            faults.append(
                f"{folder / name}: changed since the export; SHA-256 {digest}, not {manifest.files[name].sha256}"
            )
    if faults:
        raise DataError([f"{fault}. Export again or copy the whole export." for fault in faults])


def pack(folder: Path, target: Path) -> None:
    """Zip a folder: names sorted, one date, one mode, nothing compressed (weights do not shrink)."""
    with replacing(target) as stream, zipfile.ZipFile(stream, "w") as archive:
        for name in files_below(folder):
            entry = zipfile.ZipInfo(name, _ZIP_EPOCH)
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            entry.create_system = 3  # Unix, whatever system packs
            entry.file_size = (folder / name).stat().st_size
            with (folder / name).open("rb") as source, archive.open(entry, "w") as packed:
                shutil.copyfileobj(source, packed, _CHUNK)


def unpack(archive_path: Path, folder: Path) -> None:
    """Unzip an export. Raises DataError, before anything is written, for any name that an export does not hold."""
    try:
        with zipfile.ZipFile(archive_path) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            odd = [entry for entry in entries if not _SAFE_NAME.fullmatch(entry.filename) or not _is_plain(entry)]
            if odd or len(set(map(str.lower, names))) < len(names):
                culprit = odd[0].filename if odd else "a name that stands twice"
                raise DataError(f"{archive_path}: not an export, it holds {culprit!r}. Give a zip made by export.")
            for entry in entries:
                target = folder / entry.filename
                target.parent.mkdir(exist_ok=True)
                with archive.open(entry) as packed, target.open("wb") as stream:
                    _copy_exactly(packed, stream, entry.file_size)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise DataError(f"{archive_path}: not a whole zip file ({error}). Copy or export it again.") from None


def _is_plain(entry: zipfile.ZipInfo) -> bool:
    """A regular file, stored as it is and not encrypted: all that `pack` writes."""
    mode = entry.external_attr >> 16
    return stat.S_ISREG(mode) and entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1


def _copy_exactly(source: IO[bytes], target: IO[Any], size: int) -> None:
    while size > 0 and (chunk := source.read(min(_CHUNK, size))):
        target.write(chunk)
        size -= len(chunk)
    if size or source.read(1):
        raise zipfile.BadZipFile("an entry is not as long as it says")
