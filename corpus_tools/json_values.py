"""JSON values out of a stream, one at a time: neither the file nor the list around them is ever held.

A window of text grows until the value at its front parses, then the value's text is dropped.  The window doubles each
time, so even one huge record is parsed a handful of times, not once per chunk.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from engine.errors import DataError

LONGEST_RECORD_BYTES = 1 << 28  # more than this is a file without line ends, or no JSON at all

_DECODE = json.JSONDecoder().raw_decode


def json_values(chunks: Iterable[bytes]) -> Iterator[Any]:
    """The values of one JSON list, or of JSON values in a row.  Raises DataError (with the line) for anything else."""
    window = _Window(chunks)
    if window.next_character() == "[":
        window.position += 1
        yield from _list_values(window)
        if window.next_character():
            window.fail("something follows the list")
    while window.next_character():
        yield window.value()


def _list_values(window: _Window) -> Iterator[Any]:
    """What is between `[` and `]`; the position ends up behind the list."""
    if window.next_character() == "]":
        window.position += 1
        return
    while True:
        yield window.value()
        separator = window.next_character()
        if separator not in (",", "]"):
            window.fail("expected ',' or ']' after a record" if separator else "the list never ends; was it cut off?")
        window.position += 1
        if separator == "]":
            return


class _Window:
    """A window of JSON text that grows as a value needs it and forgets what was read."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.text = ""
        self.position = 0
        self._line = 1  # of the window's first character
        self._chunks = _decoded(chunks)

    def next_character(self) -> str:
        """Skip blank space; the character there, or "" at the end of the file."""
        while True:
            while self.position < len(self.text) and self.text[self.position] in " \t\r\n":
                self.position += 1
            if self.position < len(self.text):
                return self.text[self.position]
            if not self._grow():
                return ""

    def value(self) -> Any:
        """The next JSON value; the position moves behind it."""
        self.next_character()
        while True:
            try:
                value, end = _DECODE(self.text, self.position)
            except json.JSONDecodeError as error:
                unfinished = len(self.text[error.pos :].lstrip()) < 10 or error.msg.startswith("Unterminated")
                if not (unfinished and self._grow()):
                    self.fail(f"invalid JSON: {error.msg}", error.pos)
                continue
            except RecursionError:
                self.fail("nested too deeply")
            if end == len(self.text) and self.text[end - 1] not in '}]"' and self._grow():
                continue  # a number may go on in the next chunk
            self.position = end
            return value

    def fail(self, why: str, position: int | None = None) -> NoReturn:
        """Raise DataError naming the line."""
        line = self._line + self.text.count("\n", 0, self.position if position is None else position)
        raise DataError(f"line {line}: {why}")

    def _grow(self) -> bool:
        """Double the unread text; False at the end of the file."""
        self._line += self.text.count("\n", 0, self.position)
        self.text, self.position = self.text[self.position :], 0
        if len(self.text) > LONGEST_RECORD_BYTES:
            self.fail(f"a record is longer than {LONGEST_RECORD_BYTES:,} characters")
        wanted = 2 * len(self.text) + 1
        parts, length = [self.text], len(self.text)
        for chunk in self._chunks:
            parts.append(chunk)
            length += len(chunk)
            if length >= wanted:
                break
        grown = length > len(self.text)
        self.text = "".join(parts)
        return grown


def _decoded(chunks: Iterable[bytes]) -> Iterator[str]:
    """Chunks of UTF-8 as text.  Raises DataError naming the byte where it is none."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    offset = 0
    for chunk in chunks:
        try:
            yield decoder.decode(chunk)
        except UnicodeDecodeError as error:
            raise DataError(f"invalid UTF-8 near byte {offset + error.start:,}; convert the file to UTF-8") from error
        offset += len(chunk)
    if decoder.getstate()[0]:
        raise DataError("the file ends inside a UTF-8 character; was it cut off?")
