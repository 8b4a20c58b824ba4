"""Files at URLs, copied by fsspec to a temporary file.

Input: a URL, such as s3://bucket/rows.parquet. Output: an open temporary file with its content, or an error that names
the package that is missing, or what the driver reported. Credentials of a URL never appear in it.
"""

from __future__ import annotations

import tempfile
from typing import IO, Any

from ctxtrain.data.columns import temporary_disk
from ctxtrain.data.compression import CHUNK
from ctxtrain.errors import ConfigError, DataError
from ctxtrain.urls import HIDDEN, hide_credentials, shown

# The packages of the extra `cloud`.
_DRIVERS = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("abfs", "abfss", "az", "adl"), "adlfs"),
    **dict.fromkeys(("http", "https"), "aiohttp requests"),
}


def require_driver(url: str) -> None:
    """Raises ConfigError for a URL of no known kind, or if the package that reads it is not installed."""
    from fsspec.registry import get_filesystem_class

    if f"?{HIDDEN}" in url or f"//{HIDDEN}@" in url:
        raise ConfigError(
            f"{url}: credentials of a URL are not stored in a run. Continue the run with its own config, or give the "
            "full URL."
        )
    for part in url.split("::"):
        scheme = part.partition("://")[0].lower()
        try:
            get_filesystem_class(scheme)
        except ImportError as error:
            packages = _DRIVERS.get(scheme)
            cloud = f"pip install {packages}, or pip install 'ctxtrain[cloud]'"
            remedy = f"Run {cloud}" if packages else f"{error}"
            raise ConfigError(f"{shown(url)}: the package that reads {scheme}:// is missing. {remedy}.") from None
        except ValueError:
            known = "s3://, gs://, abfs://, https://, file:// and others that fsspec reads"
            raise ConfigError(f"{shown(url)}: {scheme}:// is no known kind of URL. Use {known}.") from None


def copy_of(url: str) -> IO[bytes]:
    """A temporary file with the content of a URL. Raises ConfigError as `require_driver` does, and DataError."""
    require_driver(url)
    copy = tempfile.TemporaryFile()  # noqa: SIM115  # the caller closes it
    try:
        _download(url, copy)
    except BaseException:
        copy.close()
        raise
    copy.seek(0)
    return copy


def _download(url: str, copy: IO[bytes]) -> None:
    reader = _Reader(url)
    try:
        while content := reader.read():
            with temporary_disk(f"a copy of {shown(url)}"):
                copy.write(content)
        with temporary_disk(f"a copy of {shown(url)}"):
            copy.flush()
    finally:
        reader.close()


class _Reader:
    """The bytes at a URL. Drivers raise exceptions of their own, of any type, which become a DataError."""

    def __init__(self, url: str) -> None:
        import fsspec

        self._url = url
        try:
            self._file: Any = fsspec.open(url, "rb").open()
        except Exception as error:
            raise self._error(error) from None

    def read(self) -> bytes:
        try:
            content: bytes = self._file.read(CHUNK)
        except Exception as error:
            raise self._error(error) from None
        return content

    def close(self) -> None:
        self._file.close()

    def _error(self, error: Exception) -> Exception:
        if isinstance(error, MemoryError):
            return error
        if isinstance(error, FileNotFoundError):
            return DataError(f"{shown(self._url)}: no such file. Check the URL.")
        reason = hide_credentials(f"{type(error).__name__}: {error}".strip(": "), self._url)
        return DataError(
            f"{shown(self._url)}: the file could not be read ({reason[:300]}). Check URL and access rights."
        )
