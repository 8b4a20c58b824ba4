"""`final_model.zip`: an export packed into one file, and unpacked again.

`pack` takes a folder of our own. `unpack` takes a zip that may come from anyone, and writes no byte of it before its
layout has been checked: it must be that of `pack`.
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
from ctxtrain.storage.atomic_files import Damaged, files_below, replacing, seal, seal_fits

FILES = frozenset({
    "config.json", "generation_config.json", "model.safetensors", "calibration.json", "codec.json", "manifest.json",
    "README.md", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
})  # fmt: skip
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest a zip can hold; one date makes equal inputs equal bytes
_CHUNK = 1 << 20
ZIP64_EXTRA = 20  # bytes that `zipfile` adds to the header of a file of 2 GiB or more
LONGEST_READ = 1 << 20
_SEAL = re.compile(rb"(sha256 [0-9a-f]{64})?")  # what `seal` puts into the comment


def pack(folder: Path, target: Path) -> None:
    """Zip a folder: names sorted, one date, one mode, nothing compressed (weights do not shrink); sealed."""
    names = files_below(folder)
    with replacing(target, sum((folder / name).stat().st_size for name in names)) as stream:
        with zipfile.ZipFile(stream, "w") as archive:
            for name in names:
                entry = zipfile.ZipInfo(name, _ZIP_EPOCH)
                entry.external_attr = (stat.S_IFREG | 0o644) << 16
                entry.create_system = 3  # Unix, whatever system packs
                entry.file_size = (folder / name).stat().st_size
                with (folder / name).open("rb") as source, archive.open(entry, "w") as packed:
                    shutil.copyfileobj(source, packed, _CHUNK)
        seal(stream)


def unpack(archive_path: Path, folder: Path) -> None:
    """Unzip an export. Raises DataError, before anything is written, if it is not laid out as `pack` does it.

    The seal is checked first; a zip without one is read, since its manifest has a digest of each file.
    """
    with open_regular(archive_path) as stream:
        if seal_fits(stream) is False:
            raise Damaged(
                f"{archive_path}: not a whole zip file (its bytes do not have the SHA-256 that was written with them). "
                "Copy or export it again."
            )
    try:
        with opened_archive(archive_path) as archive:
            for entry in archive.infolist():
                target = folder / entry.filename
                target.parent.mkdir(exist_ok=True)
                with archive.open(entry) as packed, target.open("wb") as stream:
                    _copy_exactly(packed, stream, entry.file_size)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise DataError(
            f"{archive_path}: not a whole zip file of an export ({error}). Copy or export it again."
        ) from None


class _ShortReads(io.FileIO):
    """`zipfile` reads the directory of a zip in one piece and makes an object of each entry, however many they are."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > LONGEST_READ:
            raise zipfile.BadZipFile(f"its directory takes {size >> 20:,} MiB")
        return super().read(size)


@contextmanager
def opened_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip. Raises BadZipFile unless it holds plain files of an export, one after the other and nothing between.

    So no name leads out of the folder, no entry stands twice, overlaps another, is packed, encrypted or a link, and
    what is unpacked is no larger than the zip.
    """
    with _ShortReads(path) as stream:
        try:
            archive = zipfile.ZipFile(stream)
        except (ValueError, OverflowError) as error:  # names that are no text, places before the file
            raise zipfile.BadZipFile(str(error)) from None
        with archive:
            _check_layout(archive, stream)
            yield archive


def _check_layout(archive: zipfile.ZipFile, stream: io.FileIO) -> None:
    end = 0
    names = set()
    for entry in archive.infolist():
        name = entry.orig_filename
        if name not in FILES or name in names:
            raise zipfile.BadZipFile(f"it holds {name[:100]!r}{' twice' if name in names else ''}")
        names.add(name)
        plain = stat.S_ISREG(entry.external_attr >> 16) and entry.compress_type == zipfile.ZIP_STORED
        if not plain or entry.flag_bits or entry.compress_size != entry.file_size:
            raise zipfile.BadZipFile(f"{name!r} must be a file that is neither packed nor encrypted")
        stream.seek(end)
        header = stream.read(30 + len(name))
        extra = int.from_bytes(header[28:30], "little")
        if (
            entry.header_offset != end
            or header[:4] != b"PK\3\4"
            or header[30:] != name.encode()
            or extra not in (0, ZIP64_EXTRA)
        ):
            raise zipfile.BadZipFile(f"{name!r} must begin where the file before it ends")
        end += len(header) + extra + entry.file_size
    if end != archive.start_dir or not _SEAL.fullmatch(archive.comment):
        raise zipfile.BadZipFile("it must hold the files of an export and nothing else")


def _copy_exactly(source: IO[bytes], target: IO[Any], size: int) -> None:
    while size > 0 and (chunk := source.read(min(_CHUNK, size))):
        target.write(chunk)
        size -= len(chunk)
    if size or source.read(1):
        raise zipfile.BadZipFile("an entry is not as long as it says")
