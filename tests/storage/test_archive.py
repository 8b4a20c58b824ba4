"""The zip of an export is read and hashed in one pass, and leaves nothing behind when it is damaged."""

import zipfile
from pathlib import Path

import pytest

from ctxtrain.errors import DataError
from ctxtrain.regular_files import NotRegularFile
from ctxtrain.storage import archive, atomic_files
from ctxtrain.storage.archive import pack, unpack
from ctxtrain.storage.atomic_files import DamagedFile, check_manifest, digest_file, sha256_file, write_manifest

WEIGHTS = bytes(range(256)) * 20_000  # of several chunks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    (folder / "adapter").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "config.json").write_text("")
    write_manifest(folder)
    return folder


def test_a_zip_has_the_digest_that_packing_returns_and_opens_anywhere(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    assert pack(folder, path) == sha256_file(path)
    with zipfile.ZipFile(path) as opened:
        assert opened.testzip() is None
        assert opened.read("model.safetensors") == WEIGHTS
        prefix, digest = opened.comment.split()
    assert (prefix, len(digest)) == (b"sha256", 64)
    known = {name: digest_file(folder / name) for name in atomic_files.list_files(folder)}
    assert pack(folder, tmp_path / "again.zip", known) == sha256_file(path)


def test_unpacking_returns_the_digests_that_the_manifest_is_checked_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(folder, tmp_path / "model.zip")
    digests = unpack(tmp_path / "model.zip", tmp_path / "out")
    assert digests == {name: digest_file(folder / name) for name in atomic_files.list_files(folder)}
    hashed: list[Path] = []
    monkeypatch.setattr(atomic_files, "sha256_file", hashed.append)
    check_manifest(tmp_path / "out", digests)
    assert hashed == []


def test_a_manifest_that_does_not_fit_a_sound_zip_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_bytes(WEIGHTS[::-1])
    pack(folder, tmp_path / "model.zip")
    digests = unpack(tmp_path / "model.zip", tmp_path / "out")
    with pytest.raises(DataError, match=r"model\.safetensors: changed since the export"):
        check_manifest(tmp_path / "out", digests)


def test_every_damaged_part_is_refused_and_nothing_is_left(folder: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "model.zip", tmp_path / "out"
    pack(folder, path)
    content = path.read_bytes()
    for place in (0, 12, len(content) // 2, content.rindex(b"PK\1\2") + 12, len(content) - 80, len(content) - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(DamagedFile, match="its SHA-256 differs from the one that it stores"):
            unpack(path, out)
        assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(DamagedFile):
        unpack(path, out)
    assert [file.name for file in out.rglob("*")] == ["mine.txt"]


def test_a_zip_without_a_checksum_is_checked_by_those_of_its_files(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    pack(folder, path)
    plain = path.read_bytes()[:-71]
    plain = plain[:-2] + b"\0\0"
    path.write_bytes(plain)
    assert unpack(path, tmp_path / "out").keys() == set(atomic_files.list_files(folder))
    place = plain.index(WEIGHTS[:256])
    path.write_bytes(plain[:place] + b"\1" + plain[place + 1 :])
    with pytest.raises(DataError, match=r"the bytes of 'model\.safetensors' differ from their checksum"):
        unpack(path, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_folder_is_no_zip(tmp_path: Path) -> None:
    with pytest.raises(NotRegularFile, match="got a folder"):
        unpack(tmp_path, tmp_path / "out")


def test_sizes_above_2_gib_are_written_and_read_as_long_numbers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.zip"
    pack(folder, path)
    short = path.stat().st_size
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)  # as if the weights were that large
    assert pack(folder, path) == sha256_file(path)
    assert path.stat().st_size >= short + archive.ZIP64_EXTRA
    check_manifest(tmp_path / "out", unpack(path, tmp_path / "out"))
