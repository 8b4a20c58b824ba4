"""Checkpoints that want to run code or bring the reader down: one per class of the advisories on pickle scanners.

`write_all(folder, canary)` writes them; each that could call something calls it with a command that makes `canary`.
"""

import hashlib
import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# What the advisories on picklescan and fickling (CVE-2025-1716, -1889, -1944, -1945, -10155 … -10157, and others) call,
# and what torch itself brings along.
CALLED = (Path(__file__).parent / "hostile" / "called.txt").read_text(encoding="utf-8").split()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def call(name: str, argument: str, way: int) -> bytes:
    """A pickle that calls `name(argument)`, in one of the ways that pickle knows."""
    module, _, function = name.rpartition(".")
    ways = [
        b"\x80\x02c%s\n%s\n" % (module.encode(), function.encode()) + text(argument) + b"\x85R.",
        b"\x80\x04" + text(module) + text(function) + b"\x93" + text(argument) + b"\x85R.",
        b"(" + text(argument) + b"i%s\n%s\n." % (module.encode(), function.encode()),
        b"(c%s\n%s\n" % (module.encode(), function.encode()) + text(argument) + b"o.",
        b"\x80\x02c%s\n%s\n" % (module.encode(), function.encode()) + text(argument) + b"\x85\x81.",
        b"\x80\x02c%s\n%s\n)R" % (module.encode(), function.encode()) + text(argument) + b"b.",
    ]
    return ways[way % len(ways)]


def zipped(data: bytes, **members: bytes) -> bytes:
    """The container of today's torch.save."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        names = {"data.pkl": data, "version": b"3\n", "byteorder": b"little", **members}
        for name, content in names.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def legacy(data: bytes) -> bytes:
    """The container before torch 1.6."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    return b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, system)) + data


def tarred(data: bytes) -> bytes:
    """The container before torch 0.1.10."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def script(data: bytes) -> bytes:
    """TorchScript: code beside the data."""
    code = b"def forward(self):\n  return ops.aten.system()\n"
    return zipped(data, **{"constants.pkl": data, "code/__torch__.py": code})


CONTAINERS = (zipped, legacy, bytes, tarred, script)
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu%stQ"
TENSOR = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"%s%s%s\x89ccollections\nOrderedDict\n)RtR."


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def tensor(elements: int, offset: int, size: int, stride: int, content: bytes = b"\0" * 16) -> bytes:
    """A tensor over the four floats of `content`, whatever it says of itself."""
    parts = (number(elements), number(offset), number(size) + b"\x85", number(stride) + b"\x85")
    return zipped(TENSOR % parts, **{"data/0": content})


def odd_pickles() -> Iterator[bytes]:
    """Pickles that are wrong in themselves: stacks, lengths, memos, protocols, types."""
    yield from (
        b"",
        b".",
        b"N.",
        b"0.",
        b"R.",
        b"b.",
        b"\x85R.",
        b"s.",
        b"u.",
        b"a.",
        b"e.",
        b"t.",
        b"\x81.",
        b"h\x05.",
    )
    yield from (
        b"\x80\xff.",
        b"\x80\x04\x95" + b"\xff" * 8,
        b"X\xff\xff\xff\xff",
        b"\x8d" + b"\xff" * 7 + b"\x7f",
        b"B\xff\xff\xff\x7f",
    )
    yield from (
        b"(" * 50_000,
        b"]" * 50_000 + b"a" * 49_999 + b".",
        b"((((t" * 1_000,
        b"\x8b\xff\xff\xff\x7f",
        b"I" + b"9" * 50_000 + b"\n.",
    )
    yield from (
        b"\x82\x01.",
        b"\x83\x01\x00.",
        b"\x84\x01\x00\x00\x00.",
        b"P0\n.",
        b"NQ.",
        b"(tQ.",
        b"(NNNNNtQ.",
        b"}(]NNNu.",
        b"}]Ns.",
    )
    yield from (
        b"c\n\n.",
        b"cos\n",
        b"c" + b"a" * 5_000 + b"\nb\n.",
        b"ctorch\nSize\nNR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
    )
    yield from (
        b"ctorch._utils\n_rebuild_parameter_with_state\n(NNNNtR.",
        b"ccollections\nOrderedDict\n)R(NNtb.",
        b"ctorch\ndevice\nNR.",
    )
    yield from (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(NNNNtR.",
        b"ctorch\nFloatStorage\n)R.",
        b"ctorch\nTensor\n)\x81.",
        b"c_codecs\nencode\nNR.",
    )
    yield b"cbuiltins\nbytearray\n" + number(1 << 42) + b"\x85R."
    yield b"\x80\x02}" + text("format") + b"K\x01s" + text("learner") + b"cos\nsystem\ns."


def odd_files(good: bytes) -> Iterator[bytes]:
    """Files that lie about storages and sizes, and whole ones cut short."""
    lies = [(4, 0, 1 << 40, 1), (4, 0, -1, 1), (4, 1 << 40, 4, 1), (4, -5, 4, 1), (1 << 40, 0, 4, 1), (-1, 0, 4, 1)]
    lies += [(4, 0, 4, 1 << 50), (4, 0, 4, -1), (4, 3, 4, 1), (1 << 62, 0, 1 << 61, 4), (5, 0, 5, 1), (0, 0, 1, 1)]
    for elements, offset, size, stride in lies:
        yield tensor(elements, offset, size, stride)
    yield tensor(4, 0, 4, 1, b"")
    yield zipped(TENSOR % (number(4), number(0), number(4) + b"\x85", number(1) + b"\x85"))  # no storage at all
    yield from (good[: len(good) * part // 12] for part in range(12))
    yield from (zipped(b"N.", version=value) for value in (b"", b"999999999999\n", b"-1\n", b"x"))
    yield from (zipped(b"N.", byteorder=value) for value in (b"", b"big", b"x" * 1000))
    yield from (
        b"PK\x05\x06" + b"\0" * 18,
        b"PK\x03\x04" + b"\xff" * 100,
        b"\x1f\x8b",
        b"\x7fELF",
        good + b"\0",
        good * 2,
    )


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def write_all(folder: Path, canary: Path) -> list[Path]:
    command = f"touch {canary}"
    whole = {"format": 1, "state": {"step": 0, "epochs": []}, "learner": {}, "fingerprint": {}, "environment": {}}
    files = [CONTAINERS[i % 5](call(name, command, i // 5)) for i, name in enumerate(CALLED)]
    files += [CONTAINERS[(i + 2) % 2](call(name, command, i)) for i, name in enumerate(CALLED[:30])]
    files += [CONTAINERS[0 if i % 4 else 1](data) for i, data in enumerate(odd_pickles())]
    files += odd_files(saved({"weights": torch.zeros(100)}))
    odd: tuple[Any, ...] = (
        5,
        [],
        {},
        {"format": 1},
        whole | {"format": 2},
        whole | {"format": torch.ones(3)},
        whole | {"format": True},
    )
    files += [saved(value) for value in odd]
    folder.mkdir()
    paths = [folder / f"{number}.pt" for number in range(len(files))]
    for path, content in zip(paths, files, strict=True):
        path.write_bytes(sealed(content))
    return paths


def sealed(content: bytes) -> bytes:
    """With the digest that a checkpoint ends in, so that it is torch.load that has to refuse it."""
    if content[-22:-18] == b"PK\5\6" and content.endswith(b"\0\0"):  # a zip file keeps it in its comment
        content = content[:-2] + struct.pack("<H", 71)
    content += b"sha256 "
    return content + hashlib.sha256(content).hexdigest().encode()
