"""Rows of JSON lines and of a JSON array.

Input: a stream of bytes, decompressed. Output: rows with their numbers: those of lines, or of the elements of the
array. A row that is not valid JSON is an `Unreadable` with its line and column. A stream need not fit into memory.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from typing import IO

import orjson

from ctxtrain.data import strict_json
from ctxtrain.data.notices import Notices
from ctxtrain.data.parse_report import NumberedRow, Unreadable

_CHUNK = 1 << 17  # bytes per read
_BLANKS = re.compile(r"[ \t\r\n]+")
_UTF16_REASON = "not valid JSON: the file is UTF-16 or UTF-32 text. Save it as UTF-8."
_BOM_REASON = "UTF-8 byte order mark (BOM) is not supported. Save the file as UTF-8 without BOM"


def line_rows(lines: Iterable[bytes], notices: Notices) -> Iterator[NumberedRow]:
    """One row per line. Blank lines are counted and left out."""
    is_first = True
    for number, line in enumerate(lines, start=1):
        if line.isspace():
            notices.blank_lines += 1
            continue
        try:
            # With its newline, a truncated line would fail at column 1.
            yield number, strict_json.loads(line.rstrip())
        except orjson.JSONDecodeError as error:
            yield number, _unreadable_line(number, line, error, is_first=is_first)
        is_first = False


def _unreadable_line(number: int, line: bytes, error: json.JSONDecodeError, *, is_first: bool) -> Unreadable:
    if is_first and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return Unreadable(_UTF16_REASON, f"{number}:{error.colno}", ends=True)
    if is_first and line.strip() == b"{":  # an object over several lines
        rule = "A file has one JSON object per line, or one JSON array"
        return Unreadable(f"not valid JSON: {error.msg}. {rule}.", f"{number}:{error.colno}", ends=True)
    remedy = ". Save the file as UTF-8 without BOM." if line.startswith(codecs.BOM_UTF8) else ""
    return Unreadable(f"not valid JSON: {error.msg}{remedy}", f"{number}:{error.colno}")


def array_rows(stream: IO[bytes]) -> Iterator[NumberedRow]:
    """The elements of an array of rows. After a fault that hides where a row ends, the rest is not read."""
    text = _Text(stream)
    number = 0
    text.skip_blanks()
    if text.peek() == "\ufeff":
        yield 1, text.unreadable(_BOM_REASON)
        return
    text.take("[")
    text.skip_blanks()
    while not text.take("]"):
        number += 1
        if number > 1:
            if not text.take(","):
                yield number, text.unreadable(f"not valid JSON: a comma or ] must follow row {number - 1}")
                return
            text.skip_blanks()
        row = text.next_value()
        yield number, row
        if isinstance(row, Unreadable) and row.ends:
            return
        text.skip_blanks()
    text.skip_blanks()
    if text.peek():
        yield number + 1, text.unreadable("not valid JSON: text follows the end of the array")


class _Text:
    """Text of a stream, of which only the value that is being read is kept, with the line and column of its start."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")  # the strict parser refuses them
        self._buffer = ""
        self._at = 0  # start of the rest that is not consumed
        self._line, self._column = 1, 1
        self._is_complete = False
        # It only finds where a value ends. Digits are not converted, as Python limits their number.
        self._scanner = json.JSONDecoder(parse_int=float, strict=False)

    def peek(self) -> str:
        """The next character, or "" at the end."""
        while self._at == len(self._buffer) and not self._is_complete:
            self._read(_CHUNK)
        return self._buffer[self._at : self._at + 1]

    def take(self, mark: str) -> bool:
        """Whether the next character is `mark`, which is then consumed."""
        if self.peek() != mark:
            return False
        self._advance(self._at + 1)
        return True

    def skip_blanks(self) -> None:
        while self.peek() and (blanks := _BLANKS.match(self._buffer, self._at)):
            self._advance(blanks.end())

    def next_value(self) -> object:
        """The next value, or an `Unreadable`."""
        size = _CHUNK
        while True:
            try:
                end = self._scanner.raw_decode(self._buffer, self._at)[1]
                if end < len(self._buffer) or self._is_complete:  # a number could go on
                    break
                reason, place = "", self._at
            except json.JSONDecodeError as error:
                reason, place = f"not valid JSON: {error.msg}", error.pos
            except RecursionError:
                return self.unreadable("not valid JSON: nested too deeply")
            if self._is_complete:
                return self.unreadable(reason, place)
            if len(self._buffer) - self._at > strict_json.MAX_BYTES:
                return self.unreadable(
                    reason or f"not valid JSON: a row may have at most {strict_json.MAX_BYTES >> 20} MiB", place
                )
            self._read(size)
            size *= 2  # so that a long value is scanned a few times only
        text = self._buffer[self._at : end]
        try:
            return strict_json.loads(text.encode("utf-8", "surrogateescape"))
        except orjson.JSONDecodeError as error:
            line, column = self._place(self._at + error.pos)
            return Unreadable(f"not valid JSON: {error.msg}", f"{line}:{column}")
        finally:
            self._advance(end)

    def unreadable(self, reason: str, place: int | None = None) -> Unreadable:
        """A fault at this character of the buffer, or at the next one, after which the rest is not read."""
        line, column = self._place(self._at if place is None else place)
        return Unreadable(f"{reason}. The rest of the file is not read.", f"{line}:{column}", ends=True)

    def _place(self, position: int) -> tuple[int, int]:
        passed = self._buffer[self._at : position]
        lines = passed.count("\n")
        return self._line + lines, len(passed) - passed.rfind("\n") if lines else self._column + len(passed)

    def _advance(self, position: int) -> None:
        self._line, self._column = self._place(position)
        self._at = position

    def _read(self, size: int) -> None:
        content = self._stream.read(size)
        self._is_complete = len(content) < size
        self._buffer = self._buffer[self._at :] + self._decoder.decode(content, self._is_complete)
        self._at = 0
