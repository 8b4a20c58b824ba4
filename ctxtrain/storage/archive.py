"""Pack an export into `final_model.zip`, and unpack it.

`pack` reads a folder that ctxtrain wrote. `unpack` treats the zip as untrusted: it extracts nothing until the layout is
known to be exactly the one that `pack` writes. Both pass over the bytes once.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import stat
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ctxtrain.errors import DataError
from ctxtrain.regular_files import open_regular
from ctxtrain.storage.atomic_files import (
    CHECKSUM_PREFIX,
    DIGEST_LENGTH,
    DamagedFile,
    Digester,
    FileDigest,
    digest_file,
    list_files,
    replace_atomically,
    verify_checksum,
)

EXPORT_FILES = frozenset({
    "config.json", "generation_config.json", "model.safetensors", "calibration.json", "codec.json", "manifest.json",
    "README.md", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
})  # fmt: skip
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date of a zip; a fixed date makes the zip reproducible
_CHUNK = 1 << 20
HEADER_BYTES = 30  # of a file in a zip, without its name and extra fields
_UNSEALED = CHECKSUM_PREFIX + b"0" * DIGEST_LENGTH  # stands for the comment until the digest is known
END_BYTES = 22  # of the record that ends a zip, without the comment
ZIP64_EXTRA = 20  # bytes that `zipfile` adds to the header of a file of 2 GiB or more
MAX_DIRECTORY_BYTES = 1 << 20
_CHECKSUM_COMMENT = re.compile(rb"(sha256 [0-9a-f]{64})?")  # as `append_checksum` writes it


def pack(folder: Path, target: Path, digests: Mapping[str, FileDigest] | None = None) -> str:
    """Zip a folder reproducibly: sorted names, fixed date and mode, no compression, and a checksum at the end.

    Compression is off because weights hardly compress. `digests` are those of the folder's files, by default computed
    here; they stand before a file's bytes, so that the zip is hashed while it is written. Returns its SHA-256.
    """
    names = list_files(folder)
    known = dict(digests or {}) or {name: digest_file(folder / name) for name in names}
    with replace_atomically(target, sum(known[name].bytes for name in names)) as stream:
        sealed = _SealedStream(stream)
        with zipfile.ZipFile(sealed, "w") as archive:  # type: ignore[call-overload]  # it needs `write` and `tell`
            archive.comment = _UNSEALED
            for name in names:
                entry = zipfile.ZipInfo(name, _ZIP_EPOCH)
                entry.external_attr = (stat.S_IFREG | 0o644) << 16
                entry.create_system = 3  # Unix, on every system
                entry.CRC, entry.header_offset = known[name].crc32, sealed.tell()
                entry.compress_size = entry.file_size = known[name].bytes
                sealed.write(entry.FileHeader())
                with (folder / name).open("rb") as source:
                    shutil.copyfileobj(source, sealed, _CHUNK)
                archive.filelist.append(entry)
                archive.NameToInfo[name] = entry
            # `ZipFile.open` would go back to each header for its checksum. Instead it only writes the directory.
            archive.start_dir, archive._didModify = sealed.tell(), True
        return sealed.sha256()


class _SealedStream:
    """A stream for `zipfile` that hashes what it writes and puts the SHA-256 into the comment, which comes last."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._sha256 = hashlib.sha256()

    def write(self, content: bytes) -> int:
        if content == _UNSEALED:
            self._put(CHECKSUM_PREFIX)
            content = self._sha256.hexdigest().encode()
        self._put(content)
        return len(content)

    def tell(self) -> int:
        return self._stream.tell()

    def flush(self) -> None:
        self._stream.flush()

    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def _put(self, content: bytes) -> None:
        self._sha256.update(content)
        self._stream.write(content)


def unpack(archive_path: Path, folder: Path) -> dict[str, FileDigest]:
    """Unzip an export and return the digest of each file; the zip is read and hashed in one pass.

    Raises DataError, before anything is written, if the layout differs from that of `pack`, and after files were
    written and deleted, if the bytes differ from their checksum. A zip without one is accepted, because its manifest
    has a digest of each file.
    """
    open_regular(archive_path).close()  # raises what it raises for a pipe or a missing file
    try:
        with open_archive(archive_path) as (archive, stream), _removed_on_error(folder, archive.namelist()):
            return _extract(archive, stream, folder)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        with open_regular(archive_path) as stream:
            if verify_checksum(stream) is False:
                raise DamagedFile(
                    f"{archive_path}: not a whole zip file (its SHA-256 differs from the one that it stores). "
                    "Copy or export it again."
                ) from None
        raise DataError(
            f"{archive_path}: not a whole zip file of an export ({error}). Copy or export it again."
        ) from None


def _extract(archive: zipfile.ZipFile, stream: IO[bytes], folder: Path) -> dict[str, FileDigest]:
    """Write the files, which lie one after the other. Raises BadZipFile if the bytes differ from a checksum."""
    whole, digests = hashlib.sha256(), {}
    folder.mkdir(exist_ok=True)
    stream.seek(0)
    with ThreadPoolExecutor(1, "hashing") as hashing:  # the zip's digest, beside that of the file
        for entry in archive.infolist():
            target = folder / entry.filename
            target.parent.mkdir(exist_ok=True)
            whole.update(_read_header(stream, entry))
            digester, left = Digester(), entry.file_size
            with target.open("wb") as file:
                while left and (chunk := stream.read(min(_CHUNK, left))):
                    hashed = hashing.submit(whole.update, chunk)
                    digester.update(chunk)
                    file.write(chunk)
                    left -= len(chunk)
                    hashed.result()
            digests[entry.filename] = digester.digest()
            if left or digests[entry.filename].crc32 != entry.CRC:
                raise zipfile.BadZipFile(f"the bytes of {entry.filename!r} differ from their checksum")
    ending = stream.read(MAX_DIRECTORY_BYTES)
    if archive.comment:
        whole.update(ending[:-DIGEST_LENGTH])
        if whole.hexdigest().encode() != ending[-DIGEST_LENGTH:]:
            raise zipfile.BadZipFile("its bytes differ from their SHA-256")
    return digests


def _read_header(stream: IO[bytes], entry: zipfile.ZipInfo) -> bytes:
    """The bytes before those of a file."""
    fixed = stream.read(HEADER_BYTES)
    return fixed + stream.read(len(entry.filename) + int.from_bytes(fixed[28:30], "little"))


@contextmanager
def _removed_on_error(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """If the block fails, delete the files of these names, and folders that it made."""
    folders = [path for path in (folder / "adapter", folder) if not path.exists()]
    try:
        yield
    except BaseException:
        for name in names:
            (folder / name).unlink(missing_ok=True)
        for path in folders:
            with suppress(OSError):  # report the first error, not that of the cleanup
                path.rmdir()
        raise


class _BoundedReads(io.FileIO):
    """A file that refuses large reads, which bounds the size of a zip's directory.

    `zipfile` reads the whole directory at once and builds an object for each entry, without a limit.
    """

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"its directory is {size >> 20:,} MiB long")
        return super().read(size)


@contextmanager
def open_archive(path: Path) -> Iterator[tuple[zipfile.ZipFile, IO[bytes]]]:
    """Open a zip, with the stream that it is read from.

    Raises BadZipFile unless it holds uncompressed files of an export, one directly after the other. This excludes paths
    outside the folder, duplicate or overlapping entries, encryption, links and zip bombs: the extracted files are never
    larger than the zip.
    """
    with _BoundedReads(path) as stream:
        try:
            archive = zipfile.ZipFile(stream)
        except (ValueError, OverflowError) as error:  # undecodable names, negative offsets
            raise zipfile.BadZipFile(str(error)) from None
        with archive:
            _check_layout(archive, stream)
            yield archive, stream


def _check_layout(archive: zipfile.ZipFile, stream: io.FileIO) -> None:
    end = 0
    names = set()
    for entry in archive.infolist():
        name = entry.orig_filename
        if name not in EXPORT_FILES or name in names:
            raise zipfile.BadZipFile(f"it holds {name[:100]!r}{' twice' if name in names else ''}")
        names.add(name)
        plain = stat.S_ISREG(entry.external_attr >> 16) and entry.compress_type == zipfile.ZIP_STORED
        if not plain or entry.flag_bits or entry.compress_size != entry.file_size:
            raise zipfile.BadZipFile(f"{name!r} must be a regular file, neither compressed nor encrypted")
        stream.seek(end)
        header = stream.read(HEADER_BYTES + len(name))
        extra = int.from_bytes(header[28:30], "little")
        if (
            entry.header_offset != end
            or header[:4] != b"PK\3\4"
            or header[HEADER_BYTES:] != name.encode()
            or extra not in (0, ZIP64_EXTRA)
        ):
            raise zipfile.BadZipFile(f"{name!r} must start where the previous file ends")
        end += len(header) + extra + entry.file_size
    if end != archive.start_dir or not _CHECKSUM_COMMENT.fullmatch(archive.comment):
        raise zipfile.BadZipFile("it must hold the files of an export and nothing else")
    stream.seek(archive.start_dir)
    last = stream.read(MAX_DIRECTORY_BYTES)[-END_BYTES - len(archive.comment) :]
    if last[:4] != b"PK\5\6" or int.from_bytes(last[20:END_BYTES], "little") != len(archive.comment):
        raise zipfile.BadZipFile("it must end where its directory ends")
