"""Atomic file writes, checksums and manifests.

A file is written under a temporary name in the same folder, flushed to the disk and renamed into place; then the folder
is flushed. A reader sees either the old or the new content, even after a crash or a power cut. A failed flush is not
retried, because the kernel may have dropped the unwritten pages: the new file is deleted and the old one stays.

Checkpoints and `final_model.zip` are zip files with a checksum: the zip comment, at the end of the file, holds the
SHA-256 of all bytes before the digest. Content and digest therefore become visible in one rename; a separate digest
file could be of another version. torch.load, unzip and zipfile ignore the comment.
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
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from ctxtrain.errors import DataError
from ctxtrain.regular_files import non_regular_kind, open_regular, read_regular
from ctxtrain.storage.validated import validation_faults

MANIFEST = "manifest.json"
_CHUNK = 1 << 20
_END, _END_SIGNATURE = struct.Struct("<4s16sH"), b"PK\5\6"  # the last record of a zip; ends with the comment length
CHECKSUM_PREFIX, DIGEST_LENGTH = b"sha256 ", 64
_OS_ERROR = re.compile(r"\(os error ([0-9]+)\)")


class ManifestEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    sha256: str
    bytes: int


class Manifest(BaseModel):
    """Digest and size of every file of an export except the manifest."""

    model_config = ConfigDict(extra="forbid", strict=True)

    files: dict[str, ManifestEntry]


@dataclass(frozen=True)
class FileDigest:
    """SHA-256 and CRC-32 of a file, computed in one pass over its bytes."""

    sha256: str
    crc32: int
    bytes: int


class Digester:
    """Computes a `FileDigest` from the parts of a file, while they are written or read."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._crc32 = self._bytes = 0

    def update(self, content: bytes | memoryview) -> None:
        self._sha256.update(content)
        self._crc32 = zlib.crc32(content, self._crc32)
        self._bytes += len(content)

    def digest(self) -> FileDigest:
        return FileDigest(self._sha256.hexdigest(), self._crc32, self._bytes)


class DamagedFile(DataError):
    """The content of a file differs from what was written."""


class WriteFailed(OSError):
    """A failed write. The message has the bytes needed and the bytes free."""


@contextmanager
def annotate_write_errors(path: Path, size: int) -> Iterator[None]:
    """Convert write errors in the block to WriteFailed, with the path, the bytes needed and the bytes free.

    Libraries written in Rust raise exceptions that are no OSError and have the error number in their text.
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
        space = f"{size:,} bytes needed, {_format_free_bytes(path)} free"
        raise WriteFailed(code, f"{reason} ({space})", str(path)) from error


def _format_free_bytes(path: Path) -> str:
    try:
        return f"{shutil.disk_usage(path if path.is_dir() else path.parent).free:,}"
    except OSError:
        return "unknown"


@contextmanager
def replace_atomically(path: Path, size: int) -> Iterator[IO[bytes]]:
    """Open a stream for about `size` bytes that replaces the file at `path` when the block succeeds.

    If the block fails, the temporary file is deleted. Raises WriteFailed. If only the flush of the folder fails, the
    new file is in place, but a power cut may restore the old one.
    """
    with annotate_write_errors(path, size):
        scratch = scratch_path(path)
        new = scratch.open("x+b")  # respects the umask; tempfile does not
        try:
            with new as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            scratch.replace(path)
        except BaseException:
            with suppress(OSError):  # report the first error, not that of the cleanup
                scratch.unlink()
            raise
        sync(path.parent)


def scratch_path(path: Path) -> Path:
    """An unused temporary path in the same folder, which includes the name of the file."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    with replace_atomically(path, len(content)) as stream:
        stream.write(content)


def append_checksum(archive: IO[bytes]) -> None:
    """Write the SHA-256 of a zip file to its comment, which must be empty."""
    archive.seek(-_END.size, os.SEEK_END)
    signature, _, length = _END.unpack(archive.read(_END.size))
    assert (signature, length) == (_END_SIGNATURE, 0), "not a zip file without comment"
    archive.seek(-2, os.SEEK_END)
    archive.write(struct.pack("<H", len(CHECKSUM_PREFIX) + DIGEST_LENGTH) + CHECKSUM_PREFIX)
    digest = _digest(archive, archive.tell())
    archive.write(digest)


def verify_checksum(archive: IO[bytes]) -> bool | None:
    """Whether the content of a zip file matches its checksum; None for a zip file without a checksum."""
    size = archive.seek(0, os.SEEK_END)
    archive.seek(max(0, size - _END.size - len(CHECKSUM_PREFIX) - DIGEST_LENGTH))
    tail = archive.read()
    if tail[-_END.size :][:4] == _END_SIGNATURE and tail.endswith(b"\0\0"):
        return None
    content_size = size - DIGEST_LENGTH
    stored = tail[-DIGEST_LENGTH:]
    matches = tail[:-DIGEST_LENGTH].endswith(CHECKSUM_PREFIX) and stored == _digest(archive, content_size)
    archive.seek(0)
    return matches


def _digest(stream: IO[bytes], size: int) -> bytes:
    """The hexadecimal SHA-256 of the first `size` bytes. Leaves the stream positioned after them."""
    digest = hashlib.sha256()
    stream.seek(0)
    for start in range(0, size, _CHUNK):
        digest.update(stream.read(min(_CHUNK, size - start)))
    return digest.hexdigest().encode()


def make_folder(folder: Path) -> None:
    """Create a folder with its missing parents, and flush their directory entries to the disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)


@contextmanager
def fill_empty_folder(folder: Path) -> Iterator[Path]:
    """Yield a scratch folder inside the empty `folder`; when the block succeeds, its files move to `folder`.

    They are flushed to the disk before. If the block fails, they are deleted.
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
    """Flush a file, or the entries of a folder, to the disk."""
    with annotate_write_errors(path, 0):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> None:
    """Create `target` as a hard link to `source`, or as a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync(target)


def sha256_file(path: Path) -> str:
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def list_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def digest_file(path: Path) -> FileDigest:
    digester = Digester()
    with open_regular(path) as stream:
        while chunk := stream.read(_CHUNK):
            digester.update(chunk)
    return digester.digest()


def write_manifest(folder: Path, known: Mapping[str, FileDigest] | None = None) -> dict[str, FileDigest]:
    """Write the manifest of an export and return the digest of every file, the manifest included.

    `known` has the digests of files that were computed while they were written; the other files are read.
    """
    digests = dict(known or {})
    names = [name for name in list_files(folder) if name != MANIFEST]
    digests |= {name: digest_file(folder / name) for name in names if name not in digests}
    entries = {name: {"sha256": digests[name].sha256, "bytes": digests[name].bytes} for name in names}
    write_json(folder / MANIFEST, {"files": entries})
    return digests | {MANIFEST: digest_file(folder / MANIFEST)}


def check_manifest(folder: Path, digests: Mapping[str, FileDigest] | None = None) -> None:
    """Raise DataError with every file of an export that is missing, changed or not listed in the manifest.

    `digests` are those of files that were computed while they were unpacked; the other files are read.
    """
    known = {} if digests is None else {name: digest.sha256 for name, digest in digests.items()}
    try:
        manifest = Manifest.model_validate_json(read_regular(folder / MANIFEST))
    except FileNotFoundError:
        raise DataError(
            f"{folder}: not an export, it has no {MANIFEST}. Give a folder or zip made by export."
        ) from None
    except ValidationError as error:
        raise DataError(
            [f"{folder / MANIFEST}: {reason}. Export again." for reason in validation_faults(error)]
        ) from None
    kinds = {path: non_regular_kind(path) for path in sorted(folder.rglob("*")) if not path.is_dir()}
    if special := {path: kind for path, kind in kinds.items() if kind}:
        rule = "an export has only regular files"
        raise DataError([f"{path}: {rule}, got {kind}. Move it away." for path, kind in special.items()])
    present = {name for name in list_files(folder) if name != MANIFEST}
    missing, added = sorted(manifest.files.keys() - present), sorted(present - manifest.files.keys())
    faults = [f"{folder / name}: listed in {MANIFEST} but missing. Export again" for name in missing]
    faults += [f"{folder / name}: not listed in {MANIFEST}. Move it away" for name in added]
    for name in sorted(present & manifest.files.keys()):
        digest = known.get(name) or sha256_file(folder / name)
        if digest != manifest.files[name].sha256:
            faults.append(
                f"{folder / name}: changed since the export: SHA-256 must be {manifest.files[name].sha256}, "
                f"got {digest}. Export again"
            )
    if faults:
        raise DataError([f"{fault}, or copy the whole export." for fault in faults])
