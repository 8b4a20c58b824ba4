"""Zip files that are no export, though they look like one: names, kinds, sizes and places that mislead a reader.

Each is made from the bytes that `pack` writes, so it differs from a sound one in the point it is about.
"""

import io
import stat
import struct
import zipfile
from ast import literal_eval
from collections.abc import Iterator
from pathlib import Path

LINES = (Path(__file__).parent / "hostile" / "names.txt").read_text(encoding="utf-8").splitlines()
NAMES = [*map(literal_eval, LINES), "a" * 5_000]


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_STORED, mode: int = stat.S_IFREG | 0o644) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name or "x", (1980, 1, 1, 0, 0, 0))
            entry.filename = name  # as it stands, where ZipInfo would mend it
            entry.external_attr, entry.compress_type, entry.create_system = mode << 16, method, 3
            archive.writestr(entry, content)
    return buffer.getvalue()


SOUND = {"codec.json": b"{}" * 20, "config.json": b"[]" * 20}
GOOD = zipped(SOUND)
SECOND = GOOD.index(b"PK\3\4", 4)  # header of the second file
FIRST_ENTRY = GOOD.index(b"PK\1\2")
SECOND_ENTRY = GOOD.index(b"PK\1\2", FIRST_ENTRY + 4)
END = GOOD.index(b"PK\5\6")


def patched(place: int, layout: str, *values: int) -> bytes:
    """The sound zip with little-endian numbers written at a place."""
    raw = struct.pack("<" + layout, *values)
    return GOOD[:place] + raw + GOOD[place + len(raw) :]


def entry(**numbers: int) -> bytes:
    """The sound zip whose directory says something else of its second file."""
    fields = {"version": (6, "H"), "flags": (8, "H"), "method": (10, "H"), "packed": (20, "I"), "size": (24, "I")}
    fields |= {
        "name_length": (28, "H"),
        "extra_length": (30, "H"),
        "disk": (34, "H"),
        "kind": (38, "I"),
        "offset": (42, "I"),
    }
    content = GOOD
    for name, value in numbers.items():
        place, layout = fields[name]
        raw = struct.pack("<" + layout, value)
        content = content[: SECOND_ENTRY + place] + raw + content[SECOND_ENTRY + place + len(raw) :]
    return content


def odd_zips() -> Iterator[tuple[str, bytes]]:
    for name in NAMES:
        yield f"name {name[:40]!r}", zipped({"codec.json": b"{}", name: b"{}"})
    for kind in (stat.S_IFLNK, stat.S_IFDIR, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK, 0):
        yield f"kind {kind:o}", zipped(SOUND, mode=kind | 0o777)
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        yield f"bomb by method {method}", zipped({"model.safetensors": b"\0" * 20_000_000}, method)
    yield "a zip in a zip", zipped({"final_model.zip": GOOD})
    twice = zipped({"config.json": b"{}", "Config.json": b"{}"})
    yield "the same file twice", twice.replace(b"Config.json", b"config.json")
    yield "one file in the directory twice", patched(SECOND_ENTRY + 42, "I", 0).replace(b"config.json", b"codec.json\0")
    yield "overlap: one content for two", patched(SECOND_ENTRY + 42, "I", 0)
    yield "overlap: the second inside the first", entry(offset=10)
    yield "the second far behind the end", entry(offset=1 << 31)
    yield "longer than it is", entry(size=1 << 31)
    yield "shorter than it is", entry(size=3)
    yield "packed longer than it is", entry(packed=1 << 31, size=1 << 31)
    yield "packed shorter than it is", entry(packed=3, size=3)
    yield "of no length", entry(packed=0, size=0)
    yield "encrypted", entry(flags=1)
    yield "strongly encrypted", entry(flags=0x41)
    yield "with a size behind the content", entry(flags=8)
    yield "patched data", entry(flags=0x20)
    yield "names in UTF-8 that are none", entry(flags=0x800).replace(b"config.json", b"conf\xff\xfe.json")
    yield "an unknown method", entry(method=99)
    yield "a later format", entry(version=99)
    yield "another name before the content", GOOD[:SECOND] + GOOD[SECOND:].replace(b"config.json", b"README.json", 1)
    yield "no header before the content", GOOD[:SECOND] + b"XXXX" + GOOD[SECOND + 4 :]
    yield "a hole between", moved(b"\0" * 100, SECOND)
    yield "a program before", b"#!/bin/sh\nexit 1\n" + GOOD
    yield "a picture before", b"\x89PNG\r\n\x1a\n" + b"\0" * 1_000 + GOOD
    yield "a page behind", GOOD + b"<html>"
    yield "a comment", patched(END + 20, "H", 10) + b"0123456789"
    yield "a directory that ends early", patched(END + 12, "I", 10)
    yield "a directory that ends late", patched(END + 12, "I", 1 << 31)
    yield "a directory elsewhere", patched(END + 16, "I", 5)
    yield "a directory before the file", patched(END + 16, "I", 0xFFFFFFF0)
    yield "two directories", GOOD + GOOD[FIRST_ENTRY:]
    yield "a zip behind a zip", GOOD + GOOD
    yield "zip64 that lies", GOOD[:END] + zip64(1 << 40, 1 << 40) + GOOD[END:]
    yield "a million files", million()
    yield "a million files in a word", million(entries=2)
    for part in range(8):
        yield f"cut at {part} eighths", GOOD[: len(GOOD) * part // 8]
    yield "one byte short", GOOD[:-1]


def moved(extra: bytes, place: int) -> bytes:
    """The sound zip with bytes put in, and every place behind them set right."""
    content = bytearray(GOOD[:place] + extra + GOOD[place:])
    for where in (SECOND_ENTRY + len(extra) + 42, END + len(extra) + 16):
        value = struct.unpack_from("<I", content, where)[0] + len(extra)
        struct.pack_into("<I", content, where, value)
    return bytes(content)


def zip64(size: int, offset: int) -> bytes:
    record = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, size, offset)
    return record + struct.pack("<4sIQI", b"PK\6\7", 0, END, 1)


def million(entries: int = 0xFFFF) -> bytes:
    record = GOOD[FIRST_ENTRY:SECOND_ENTRY]
    body = GOOD[:FIRST_ENTRY]
    size = len(record) * 1_000_000
    return body + record * 1_000_000 + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, entries, entries, size, len(body), 0)
