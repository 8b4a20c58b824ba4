"""Pack an export into `final_model.zip`, and unpack it.

`pack` reads a folder that ctxtrain wrote. `unpack` treats the zip as untrusted: it extracts nothing until the layout is
known to be exactly the one that `pack` writes.
"""

from __future__ import annotations

import io
import re
import shutil
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ctxtrain.errors import DataError
from ctxtrain.regular_files import open_regular
from ctxtrain.storage.atomic_files import DamagedFile, append_checksum, list_files, replace_atomically, verify_checksum

EXPORT_FILES = frozenset({
    "config.json", "generation_config.json", "model.safetensors", "calibration.json", "codec.json", "manifest.json",
    "README.md", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
})  # fmt: skip
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date of a zip; a fixed date makes the zip reproducible
_CHUNK = 1 << 20
ZIP64_EXTRA = 20  # bytes that `zipfile` adds to the header of a file of 2 GiB or more
MAX_DIRECTORY_BYTES = 1 << 20
_CHECKSUM_COMMENT = re.compile(rb"(sha256 [0-9a-f]{64})?")  # as `append_checksum` writes it


def pack(folder: Path, target: Path) -> None:
    """Zip a folder reproducibly: sorted names, fixed date and mode, no compression, and a checksum at the end.

    Compression is off because weights hardly compress.
    """
    names = list_files(folder)
    with replace_atomically(target, sum((folder / name).stat().st_size for name in names)) as stream:
        with zipfile.ZipFile(stream, "w") as archive:
            for name in names:
                entry = zipfile.ZipInfo(name, _ZIP_EPOCH)
                entry.external_attr = (stat.S_IFREG | 0o644) << 16
                entry.create_system = 3  # Unix, on every system
                entry.file_size = (folder / name).stat().st_size
                with (folder / name).open("rb") as source, archive.open(entry, "w") as packed:
                    shutil.copyfileobj(source, packed, _CHUNK)
        append_checksum(stream)


def unpack(archive_path: Path, folder: Path) -> None:
    """Unzip an export. Raises DataError, before anything is written, if the layout differs from that of `pack`.

    The checksum is verified first. A zip without one is accepted, because its manifest has a digest of each file.
    """
    with open_regular(archive_path) as stream:
        if verify_checksum(stream) is False:
            raise DamagedFile(
                f"{archive_path}: not a whole zip file (its SHA-256 differs from the one that it stores). "
                "Copy or export it again."
            )
    try:
        with open_archive(archive_path) as archive:
            for entry in archive.infolist():
                target = folder / entry.filename
                target.parent.mkdir(exist_ok=True)
                with archive.open(entry) as packed, target.open("wb") as stream:
                    _copy_exactly(packed, stream, entry.file_size)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise DataError(
            f"{archive_path}: not a whole zip file of an export ({error}). Copy or export it again."
        ) from None


class _BoundedReads(io.FileIO):
    """A file that refuses large reads, which bounds the size of a zip's directory.

    `zipfile` reads the whole directory at once and builds an object for each entry, without a limit.
    """

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"its directory is {size >> 20:,} MiB long")
        return super().read(size)


@contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip. Raises BadZipFile unless it holds uncompressed files of an export, one directly after the other.

    This excludes paths outside the folder, duplicate or overlapping entries, encryption, links and zip bombs: the
    extracted files are never larger than the zip.
    """
    with _BoundedReads(path) as stream:
        try:
            archive = zipfile.ZipFile(stream)
        except (ValueError, OverflowError) as error:  # undecodable names, negative offsets
            raise zipfile.BadZipFile(str(error)) from None
        with archive:
            _check_layout(archive, stream)
            yield archive


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
        header = stream.read(30 + len(name))
        extra = int.from_bytes(header[28:30], "little")
        if (
            entry.header_offset != end
            or header[:4] != b"PK\3\4"
            or header[30:] != name.encode()
            or extra not in (0, ZIP64_EXTRA)
        ):
            raise zipfile.BadZipFile(f"{name!r} must start where the previous file ends")
        end += len(header) + extra + entry.file_size
    if end != archive.start_dir or not _CHECKSUM_COMMENT.fullmatch(archive.comment):
        raise zipfile.BadZipFile("it must hold the files of an export and nothing else")


def _copy_exactly(source: IO[bytes], target: IO[Any], size: int) -> None:
    while size > 0 and (chunk := source.read(min(_CHUNK, size))):
        target.write(chunk)
        size -= len(chunk)
    if size or source.read(1):
        raise zipfile.BadZipFile("the length of an entry differs from its header")
