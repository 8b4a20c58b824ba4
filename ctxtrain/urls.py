"""URLs of data files: which texts are one, and how they are shown without credentials.

Input: text that a user gave as the place of a file. Output: whether it is a URL, or its text for messages and reports.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

HIDDEN = "***"
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+(://|::.*://)")  # two letters at least: C: is a drive
_USER = re.compile(r"(?<=//)([^/@\s]*|[^@\s?#]*:[^@\s?#]*)@")  # a pasted secret may have slashes
_QUERY = re.compile(r"(?<=\?)[^\s#]+")


def is_url(text: str) -> bool:
    """Whether a text is a URL of fsspec, such as s3://bucket/rows.jsonl, and no path."""
    return bool(_URL.match(text))


def local_path(url: str) -> Path | None:
    """The path of a file:// URL, or None for another URL."""
    scheme, _, rest = url.partition("://")
    return Path(rest) if scheme.lower() in ("file", "local") and rest else None


def shown(text: str) -> str:
    """A URL with `***` in place of user, password and query, which may be a signature; a path as it is."""
    if not is_url(text):
        return text
    return _QUERY.sub(HIDDEN, _USER.sub(f"{HIDDEN}@", text))


def hide_credentials(message: str, url: str) -> str:
    """A message of another library without what `shown` hides of the URL."""
    secrets = {part for pattern in (_USER, _QUERY) for found in pattern.finditer(url) for part in _parts(found[0])}
    message = message.replace(url, shown(url))
    for secret in sorted(secrets, key=len, reverse=True):
        message = message.replace(secret, HIDDEN)
    return message


def _parts(found: str) -> set[str]:
    """A user with its password, or a query, with each of its values, encoded or not."""
    pieces = {found.rstrip("@"), *re.split(r"[:@&]|(?<=[&?])[^=&]*=|=", found)}
    return {form for piece in pieces if len(piece) > 2 for form in (piece, unquote(piece))}


def absolute(text: str) -> str:
    """The absolute path of a file; a URL as it is shown, since what is stored must not have credentials."""
    return shown(text) if is_url(text) else str(Path(text).absolute())
