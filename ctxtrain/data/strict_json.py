"""JSON values of one line, without duplicate keys in an object.

Input: bytes. Output: plain values. orjson refuses what RFC 8259 does not allow. Of duplicate keys it keeps the last
value, so that `{"label": "LONG", …, "label": "SHORT"}` would be a SHORT.

jiter, the parser of pydantic, refuses duplicate keys. It is not used because it reads 1e999 as infinity and accepts
integers of any length, so its values would need a check as long as this module. It also takes 1.8 times as long.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

MAX_BYTES = 16 << 20  # 600 times a row of 50 bars with every field
# Bytes that are not needed to count object members by their `":`. T and - are kept, so that the opening quote of a time
# such as "2025-01-02T10:00" is not followed by a colon.
_IRRELEVANT = bytes(set(range(256)) - set(b'":{T-'))
_TOKEN = re.compile(r'[{}]|("[^"\\]*(?:\\.[^"\\]*)*")([ \t\r\n]*:)?')


def loads(line: bytes) -> Any:
    """Parse one line.

    Raises orjson.JSONDecodeError, with the column, if the line is invalid, too long, or has a duplicate key in an
    object.
    """
    if len(line) > MAX_BYTES:
        raise orjson.JSONDecodeError(f"a row may have at most {MAX_BYTES >> 20} MiB, got {len(line) >> 20} MiB", "", 0)
    value = orjson.loads(line)
    skeleton = line.translate(None, _IRRELEVANT)
    # Only blanks separate a key from its colon, so the count of '":' in `skeleton` is an upper bound of the members. If
    # the parsed objects have as many members, no key was lost. Text that contains '":' can only raise the bound.
    if _count_members(value, skeleton.count(b"{")) != skeleton.count(b'":'):
        _refuse_duplicate_keys(line.decode())
    return value


def _count_members(value: Any, max_objects: int) -> int:
    """Number of members in the objects of a value. The search ends after `max_objects` objects."""
    members = objects = 0
    level = [value]
    while level and objects < max_objects:
        objects_of_level = [item for item in level if type(item) is dict]
        objects += len(objects_of_level)
        members += sum(map(len, objects_of_level))
        if objects < max_objects:
            level = [item for outer in level for item in _inner(outer)]
    return members


def _inner(value: Any) -> list[Any]:
    items = value.values() if type(value) is dict else value if type(value) is list else ()
    return [item for item in items if type(item) is dict or type(item) is list]


def _refuse_duplicate_keys(text: str) -> None:
    """Check every key of a valid JSON text."""
    keys: list[set[str]] = []
    for token in _TOKEN.finditer(text):
        if token[0] == "{":
            keys.append(set())
        elif token[0] == "}":
            keys.pop()
        elif token[2]:
            key = orjson.loads(token[1])  # "a" and "\u0061" are the same key
            if key in keys[-1]:
                raise orjson.JSONDecodeError(f"duplicate key {key[:60]!r} in an object", text, token.start())
            keys[-1].add(key)
