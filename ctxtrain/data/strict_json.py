"""JSON of one line, with no key twice in an object.

Comes in: bytes. Goes out: plain values. orjson refuses what RFC 8259 does not allow, but of a key that stands twice it
keeps the last value, so that `{"label": "LONG", …, "label": "SHORT"}` would be a SHORT.

jiter, pydantic's parser, refuses a key twice by itself. It is not used because it reads 1e999 as infinity and an
integer of any length as such, so that rules of this module's size would check its values. It takes 1.8 times as long.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

MAX_BYTES = 16 << 20  # 600 times a row of 50 bars with every field
# What tells members apart once the rest is gone. T and - keep the colons of a time from the quote that opens it.
_UNTOLD = bytes(set(range(256)) - set(b'":{T-'))
_TOKEN = re.compile(r'[{}]|("[^"\\]*(?:\\.[^"\\]*)*")([ \t\r\n]*:)?')


def loads(line: bytes) -> Any:
    """The value of a line. Raises orjson.JSONDecodeError, with the column, if it is not valid, too long, or has a key
    twice in one object.
    """
    if len(line) > MAX_BYTES:
        raise orjson.JSONDecodeError(f"a row takes at most {MAX_BYTES >> 20} MiB, got {len(line) >> 20}", "", 0)
    value = orjson.loads(line)
    told = line.translate(None, _UNTOLD)
    # Between a key and its colon stand only blanks, so there are at most as many members as '":' in `told`. If the
    # objects hold as many, none was lost. A text that holds '":' makes the bound too high, never too low.
    if _members(value, told.count(b"{")) != told.count(b'":'):
        _refuse_key_twice(line.decode())
    return value


def _members(value: Any, most_objects: int) -> int:
    """How many members the objects of a value hold; it looks no further once it has found `most_objects` of them."""
    members = objects = 0
    level = [value]
    while level and objects < most_objects:
        found = [item for item in level if type(item) is dict]
        objects += len(found)
        members += sum(map(len, found))
        if objects < most_objects:
            level = [item for outer in level for item in _inner(outer)]
    return members


def _inner(value: Any) -> list[Any]:
    items = value.values() if type(value) is dict else value if type(value) is list else ()
    return [item for item in items if type(item) is dict or type(item) is list]


def _refuse_key_twice(text: str) -> None:
    """Look at every key of a text that is valid JSON."""
    keys: list[set[str]] = []
    for token in _TOKEN.finditer(text):
        if token[0] == "{":
            keys.append(set())
        elif token[0] == "}":
            keys.pop()
        elif token[2]:
            key = orjson.loads(token[1])  # "a" and "\u0061" are one key
            if key in keys[-1]:
                raise orjson.JSONDecodeError(f"the key {key[:60]!r} stands twice in one object", text, token.start())
            keys[-1].add(key)
