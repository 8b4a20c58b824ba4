"""What a zip must be before a byte of it is unpacked: laid out as `pack` in `storage/atomic_files.py` writes an export.

Comes in: the path of a zip that may come from anyone. Goes out: the opened zip, or a BadZipFile.
"""

from __future__ import annotations

import io
import re
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILES = frozenset({
    "config.json", "generation_config.json", "model.safetensors", "calibration.json", "codec.json", "manifest.json",
    "README.md", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
})  # fmt: skip
ZIP64_EXTRA = 20  # bytes that `zipfile` adds to the header of a file of 2 GiB or more
LONGEST_READ = 1 << 20
_SEAL = re.compile(rb"(sha256 [0-9a-f]{64})?")  # what `seal` in `storage/atomic_files.py` puts into the comment


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
