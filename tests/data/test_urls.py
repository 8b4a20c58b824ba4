"""Rows at URLs: copied once, the same as from a file, and named without credentials."""

import hashlib
import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ctxtrain.cli.first_look import look_at_inputs
from ctxtrain.config.schema import Config
from ctxtrain.data.sources import UrlSource, require_readable
from ctxtrain.data.table_cache import TableCache
from ctxtrain.data.window_file import WindowFile, load_windows
from ctxtrain.errors import ConfigError, DataError
from ctxtrain.urls import hide_credentials, is_url, shown
from tests.data.test_formats import WRITERS, facts, some_rows
from tests.helpers import make_row


@pytest.mark.parametrize("how", ["lines", "array in gzip", "Parquet", "Arrow in zstd"])
def test_rows_at_a_url_are_those_of_a_file(how: str, tmp_path: Path) -> None:
    content = WRITERS[how](some_rows())
    fsspec.filesystem("memory").pipe("/bucket/rows", content)
    (tmp_path / "rows").write_bytes(content)
    file = WindowFile("memory://bucket/rows")
    windows = list(file)
    assert facts(windows) == facts(load_windows(tmp_path / "rows")) == facts(load_windows(f"file://{tmp_path}/rows"))
    assert windows[1].location.startswith("memory://bucket/rows:")
    assert file.sha256() == hashlib.sha256(content).hexdigest()


def test_a_url_is_copied_once_also_for_a_kept_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("memory").pipe("/bucket/rows", json.dumps(some_rows()).encode())
    opened = []
    real = MemoryFileSystem._open

    def counted(self: MemoryFileSystem, *given: Any, **more: Any) -> Any:
        opened.append(given[0])
        return real(self, *given, **more)

    monkeypatch.setattr(MemoryFileSystem, "_open", counted)
    for passes in (1, 2):
        file = WindowFile("memory://bucket/rows", cache=TableCache(tmp_path))
        assert [len(list(file)), len(list(file)), bool(file.sha256())] == [6, 6, True]
        assert len(opened) == passes
        assert isinstance(file.source, UrlSource)
        assert file.source._copy is None  # removed as soon as the table is there
    assert len(list(tmp_path.glob("*.arrow"))) == 1


@pytest.mark.parametrize(
    ("url", "error", "said"),
    [
        (
            "s3://bucket/a",
            ConfigError,
            "the package that reads s3:// is missing. Run pip install s3fs, or pip install ",
        ),
        (
            "https://host/a?sig=SECRET",
            ConfigError,
            "Run pip install aiohttp requests, or pip install 'ctxtrain[cloud]'.",
        ),
        ("sftp://me:SECRET@host/a", ConfigError, 'SFTPFileSystem requires "paramiko" to be installed.'),
        ("simplecache::s3://me:SECRET@bucket/a", ConfigError, "the package that reads s3:// is missing."),
        ("foo://bucket/a", ConfigError, "foo:// is no known kind of URL. Use s3://, gs://, abfs://, https://, file://"),
        ("https://host/a?***", ConfigError, "credentials of a URL are not stored in a run."),
        ("memory://bucket/none", DataError, "memory://bucket/none: no such file. Check the URL."),
        ("ftp://me:SECRET@localhost:1/a", DataError, "ftp://***@localhost:1/a: the file could not be read ("),
    ],
)
def test_a_url_that_cannot_be_read_is_refused_without_its_secrets(
    url: str, error: type[ConfigError | DataError], said: str
) -> None:
    with pytest.raises(error) as refused:
        load_windows(url)
    (fault,) = refused.value.faults
    assert said in fault
    assert fault.startswith(f"{shown(url)}: ")
    assert "SECRET" not in fault


def test_credentials_are_hidden_wherever_a_url_is_shown() -> None:
    assert shown("s3://KEY:SE/CRET@bucket/a.jsonl") == "s3://***@bucket/a.jsonl"
    assert shown("https://host/a.jsonl?X-Sig=SECRET&b=1") == "https://host/a.jsonl?***"
    assert shown("hf://datasets/me/rows@main/a.jsonl") == "hf://datasets/me/rows@main/a.jsonl"
    assert shown("rows?x@y.jsonl") == "rows?x@y.jsonl"
    found = [is_url(text) for text in ("C:/rows", "rows::1.jsonl", "zip://a.jsonl::s3://b/c.zip", "s3://b/c")]
    assert found == [False, False, True, True]
    url = "https://me:SE%20CRET@host/a?token=TOKEN"
    for text in (f"403 at {url}", "no user me with SE CRET", "SE%20CRET", "url('https://host/a', token='TOKEN')"):
        hidden = hide_credentials(text, url)
        assert not [secret for secret in ("SE CRET", "SE%20CRET", "TOKEN") if secret in hidden]


def test_a_config_keeps_urls_and_stores_them_without_credentials() -> None:
    data = {"train": "s3://KEY:SECRET@bucket/a.jsonl", "val": "https://host/b?sig=SECRET", "test": "memory://c/d"}
    config = Config.parse({"data": data, "output_dir": "runs/a"})
    assert config.data.train == data["train"]
    for values in (config.with_absolute_paths().data.model_dump(), config.public_values()["data"]):
        assert [values["train"], values["val"], values["test"]] == [
            "s3://***@bucket/a.jsonl", "https://host/b?***", "memory://c/d",
        ]  # fmt: skip
    assert "SECRET" not in config.with_absolute_paths().to_yaml()


def test_missing_drivers_and_files_of_a_config_are_refused_together(tmp_path: Path) -> None:
    data = {"train": "s3://bucket/a", "val": f"file://{tmp_path}/none", "test": "memory://not/looked/at"}
    with pytest.raises(ConfigError) as refused:
        look_at_inputs(Config.parse({"data": data, "output_dir": str(tmp_path / "run")}))
    first, second = refused.value.faults
    assert first.startswith("s3://bucket/a: the package that reads s3:// is missing.")
    assert second.startswith(f"{tmp_path}/none: no such file")
    require_readable("memory://not/looked/at")


def test_a_fault_at_a_url_has_its_place() -> None:
    rows = [make_row(), make_row("UP")]
    fsspec.filesystem("memory").pipe("/rows.json", json.dumps(rows).encode())
    with pytest.raises(DataError, match=r'^memory://rows\.json:row 2: label must be .*, got "UP"$'):
        load_windows("memory://rows.json")
