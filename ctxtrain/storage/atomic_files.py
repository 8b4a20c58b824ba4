"""Files that appear whole or not at all, and their hashes.

A file is written under another name in the same folder, flushed to the disk, renamed into place, and the folder is
flushed too; so a name always shows either the old content or the new one, also after a crash or a power cut. A flush
that fails is not tried again, since the system may have dropped what it could not write: the new file goes, the old
one stays.

Checkpoints and `final_model.zip` are zip files and carry a seal: the SHA-256 of all bytes before it, in the comment
that ends a zip file. So content and digest become visible by one rename, where a second file could be a version ahead
or behind, and torch.load, unzip and zipfile pass over it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from ctxtrain.errors import DataError
from ctxtrain.regular_files import odd_kind, open_regular, read_regular
from ctxtrain.storage.validated import reasons

MANIFEST = "manifest.json"
_CHUNK = 1 << 20
_END, _END_SIGNATURE = struct.Struct("<4s16sH"), b"PK\5\6"  # a zip file's last record: its comment's length comes last
_SEAL, _HEX = b"sha256 ", 64
_OS_ERROR = re.compile(r"\(os error ([0-9]+)\)")


class ManifestEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    sha256: str
    bytes: int


class Manifest(BaseModel):
    """Every file of an export but the manifest itself."""

    model_config = ConfigDict(extra="forbid", strict=True)

    files: dict[str, ManifestEntry]


class Damaged(DataError):
    """A file does not hold the bytes that were written."""


class WriteFailed(OSError):
    """A write that the system refused; says how much room it needed and how much there is."""


@contextmanager
def needing(path: Path, size: int) -> Iterator[None]:
    """Say of a failure to write below which path it was, and how many bytes it needed.

    Libraries written in Rust raise plain exceptions, with the system's error number in the text.
    """
    try:
        yield
    except WriteFailed:
        raise
    except Exception as error:
        number = _OS_ERROR.search(str(error))
        if isinstance(error, OSError):
            code, reason = error.errno or errno.EIO, error.strerror or str(error)
        elif number:
            code, reason = int(number[1]), os.strerror(int(number[1]))
        else:
            raise
        raise WriteFailed(code, f"{reason} ({size:,} bytes needed, {_free(path)} free)", str(path)) from error


def _free(path: Path) -> str:
    try:
        return f"{shutil.disk_usage(path if path.is_dir() else path.parent).free:,}"
    except OSError:
        return "unknown"


@contextmanager
def replacing(path: Path, size: int) -> Iterator[IO[bytes]]:
    """Open a stream whose content, of about `size` bytes, takes the place of `path` when the block ends well.

    When it does not, the new file vanishes. Raises WriteFailed. If it is the folder that cannot be flushed, the new
    file is in place, but a power cut may take it back.
    """
    with needing(path, size):
        scratch = scratch_for(path)
        new = scratch.open("x+b")  # the umask says who may read it; tempfile would not ask
        try:
            with new as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            scratch.replace(path)
        except BaseException:
            with suppress(OSError):  # the first failure is the one to tell
                scratch.unlink()
            raise
        sync(path.parent)


def scratch_for(path: Path) -> Path:
    """A new name in the same folder, which shows whose it is."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    with replacing(path, len(content)) as stream:
        stream.write(content)


def seal(archive: IO[bytes]) -> None:
    """Write the SHA-256 of a zip file into its comment, which must be empty."""
    archive.seek(-_END.size, os.SEEK_END)
    signature, _, length = _END.unpack(archive.read(_END.size))
    assert (signature, length) == (_END_SIGNATURE, 0), "not a zip file without comment"
    archive.seek(-2, os.SEEK_END)
    archive.write(struct.pack("<H", len(_SEAL) + _HEX) + _SEAL)
    digest = _digest(archive, archive.tell())
    archive.write(digest)


def seal_fits(archive: IO[bytes]) -> bool | None:
    """Whether a file is what was sealed; None if it ends as a zip file that never had a seal."""
    size = archive.seek(0, os.SEEK_END)
    archive.seek(max(0, size - _END.size - len(_SEAL) - _HEX))
    tail = archive.read()
    if tail[-_END.size :][:4] == _END_SIGNATURE and tail.endswith(b"\0\0"):
        return None
    fits = tail[:-_HEX].endswith(_SEAL) and tail[-_HEX:] == _digest(archive, size - _HEX)
    archive.seek(0)
    return fits


def _digest(stream: IO[bytes], size: int) -> bytes:
    """SHA-256, in hexadecimal, of the first `size` bytes; the stream is left after them."""
    digest = hashlib.sha256()
    stream.seek(0)
    for start in range(0, size, _CHUNK):
        digest.update(stream.read(min(_CHUNK, size - start)))
    return digest.hexdigest().encode()


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing, and flush their names to the disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)


@contextmanager
def new_content(folder: Path) -> Iterator[Path]:
    """A scratch folder inside an empty one; when the block ends well its files, flushed, go into the empty one.

    When it does not, they vanish.
    """
    with tempfile.TemporaryDirectory(prefix=".new.", dir=folder) as name:
        scratch = Path(name)
        yield scratch
        for path in scratch.rglob("*"):
            sync(path)
        for path in scratch.iterdir():
            path.rename(folder / path.name)
    sync(folder)


def write_json(path: Path, value: object) -> None:
    write_bytes(path, to_json(value))


def to_json(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    with needing(path, 0):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def share_or_copy(source: Path, target: Path) -> None:
    """Make a new `target` the same file as `source` where the file system can link, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync(target)


def sha256_file(path: Path) -> str:
    with open_regular(path) as stream:
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
        manifest = Manifest.model_validate_json(read_regular(folder / MANIFEST))
    except FileNotFoundError:
        raise DataError(
            f"{folder}: not an export, it has no {MANIFEST}. Give a folder or zip made by export."
        ) from None
    except ValidationError as error:
        raise DataError([f"{folder / MANIFEST}: {reason}. Export again." for reason in reasons(error)]) from None
    odd = sorted(path for path in folder.rglob("*") if odd_kind(path) and not path.is_dir())
    if odd:
        raise DataError([f"{path}: {odd_kind(path)}, and an export has files alone. Move it away." for path in odd])
    found = {name for name in files_below(folder) if name != MANIFEST}
    lost, added = sorted(manifest.files.keys() - found), sorted(found - manifest.files.keys())
    faults = [f"{folder / name}: listed in {MANIFEST} but missing. Export again" for name in lost]
    faults += [f"{folder / name}: not listed in {MANIFEST}. Move it away" for name in added]
    for name in sorted(found & manifest.files.keys()):
        digest = sha256_file(folder / name)
        if digest != manifest.files[name].sha256:
            faults.append(
                f"{folder / name}: changed since the export; SHA-256 {digest}, not {manifest.files[name].sha256}. "
                "Export again"
            )
    if faults:
        raise DataError([f"{fault}, or copy the whole export." for fault in faults])
