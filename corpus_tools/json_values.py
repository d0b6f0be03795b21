"""JSON values out of a stream, one at a time: neither the file nor the list around them is ever held.

A window of text grows until the value at its front parses, then the value's text is dropped.  The window doubles each
time, so even one huge record is parsed a handful of times, not once per chunk.

What is broken is one record, not the rest of the file.  So a `Broken` is handed out in its place and reading goes on
where the next record begins (`json_recovery`).  Bytes that are no UTF-8 stay in the text as lone surrogates, which
otherwise only a `\\u` escape can make, so they too spoil their own record only.
"""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from corpus_tools import json_recovery

LONGEST_RECORD_BYTES = 1 << 28  # more than this is a file without line ends, or no JSON at all
LOOKAHEAD = 1 << 16  # characters behind the error that are there when the next record is looked for
LONGEST_BLANK, LONGEST_WORD = 4096, 10  # what a window may end with in the middle of a value: spaces, `true`

LONGEST_WHOLE_NUMBER = 20  # digits; longer ones become floats, as Python refuses those of thousands
DECODER = json.JSONDecoder(parse_int=lambda digits: (int if len(digits) <= LONGEST_WHOLE_NUMBER else float)(digits))
BLANK = " \t\r\n"
NO_UTF8 = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Broken:
    """What stands where a record should."""

    line: int
    why: str
    at_end: bool = False  # nothing follows it

    def __str__(self) -> str:
        return f"line {self.line}: {self.why}"


def json_values(chunks: Iterable[bytes]) -> Iterator[Any]:
    """The values of JSON lists and of JSON values in a row, and a `Broken` for each that is none."""
    window = _Window(chunks)
    in_list = False
    while character := window.next_character():
        if not in_list and character in "[,":
            if character == ",":  # a list that seemed to end goes on
                yield Broken(window.line(), "expected a record, not ','")
            window.position += 1
            in_list = not window.skip("]")
            continue
        value = window.value(in_list)
        yield value
        if in_list:
            yield from _behind(window, isinstance(value, Broken))
            in_list = not window.skip("]")
    if in_list and not window.ends_broken:
        yield Broken(window.line(), "the list never ends; was it cut off?", at_end=True)


def _behind(window: _Window, broken: bool) -> Iterator[Broken]:
    """What follows a value of a list: a comma, which is passed over, or its end."""
    character = window.next_character()
    if window.skip(",") or character in ("]", "") or (broken and character == "{"):
        return
    yield Broken(window.line(), "expected ',' or ']' after a record")
    if character != "{":
        window.skip_broken(window.position, in_list=True)
        window.skip(",")


class _Window:
    """A window of JSON text that grows as a value needs it and forgets what was read."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.text = ""
        self.position = 0
        self.ends_broken = False  # the file ends inside of something that is no record
        self._line = 1  # of the window's first character
        self._column = 0
        self._spoiled = False  # some byte so far was no UTF-8
        self._chunks = _decoded(chunks)

    def next_character(self) -> str:
        """Skip blank space; the character there, or "" at the end of the file."""
        while True:
            while self.position < len(self.text) and self.text[self.position] in BLANK:
                self.position += 1
            if self.position < len(self.text):
                return self.text[self.position]
            if not self._grow():
                return ""

    def skip(self, character: str) -> bool:
        """Whether the next character is this one; then the position moves behind it."""
        found = self.next_character() == character
        self.position += found
        return found

    def value(self, in_list: bool) -> Any:
        """The next JSON value, or a Broken; the position moves behind it."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                why = f"invalid JSON: {error.msg}"
                if self._unfinished(error):
                    if len(self.text) - self.position > LONGEST_RECORD_BYTES:
                        why = f"a record is longer than {LONGEST_RECORD_BYTES:,} characters"
                    elif self._grow():
                        continue
                return self._broken(why, error.pos, in_list)
            except RecursionError:
                return self._broken("nested too deeply", self.position, in_list)
            if end == len(self.text) and self.text[end - 1] not in '}]"' and self._grow():
                continue  # a number may go on in the next chunk
            if not isinstance(value, dict | list) and not self._may_follow(end, in_list):
                return self._broken("expected a record", end, in_list)
            if self._spoiled and NO_UTF8.search(self.text, self.position, end):
                value = Broken(self.line(), "invalid UTF-8")
            self.position = end
            return value

    def _may_follow(self, end: int, in_list: bool) -> bool:
        """Whether a value may end there: not where its text goes on, as behind a string that was a key."""
        following = json_recovery.FOLLOWING[in_list]
        while (found := following.match(self.text, end)) is None or found.end() == len(self.text):
            end -= self.position
            if not self._grow():
                return found is not None
        return True

    def _unfinished(self, error: json.JSONDecodeError) -> bool:
        """Whether more text may help: the window ends in the middle of a value."""
        rest = self.text[error.pos : error.pos + LONGEST_BLANK]
        at_end = len(rest) < LONGEST_BLANK and len(rest.lstrip()) < LONGEST_WORD
        return at_end or error.msg.startswith("Unterminated")

    def line(self, position: int | None = None) -> int:
        """The line of a place in the window."""
        return self._line + self.text.count("\n", 0, self.position if position is None else position)

    def _broken(self, why: str, error: int, in_list: bool) -> Broken:
        line = self.line(error)
        self.skip_broken(error, in_list)
        return Broken(line, why, self.ends_broken)

    def skip_broken(self, error: int, in_list: bool) -> None:
        """Move the position from a broken record, wrong at `error`, to where the next one begins."""
        error -= self.position
        self._drop()
        column = self._column if self.text[:1] in ("{", "[") else sys.maxsize
        while len(self.text) < error + LOOKAHEAD and self._grow():
            pass
        complete = False
        while True:
            try:
                found = json_recovery.end_of_broken(self.text, error, column, in_list, complete=complete)
                break
            except json_recovery.NeedsMoreText:
                complete = not self._grow()
        key = json_recovery.first_key(self.text, 0)
        while found is None:
            self.position = max(0, len(self.text) - json_recovery.OVERLAP)
            if not self._grow():
                self.ends_broken, found = True, len(self.text)
                break
            found = json_recovery.next_record(self.text, 0, column, in_list, key)
        self.position = found

    def _drop(self) -> None:
        """Forget what was read."""
        begin = self.text.rfind("\n", 0, self.position)
        self._column = self.position - begin - 1 if begin >= 0 else self._column + self.position
        self._line, self.text, self.position = self.line(), self.text[self.position :], 0

    def _grow(self) -> bool:
        """Double the unread text; False at the end of the file."""
        self._drop()
        parts, length = [self.text], len(self.text)
        for chunk in self._chunks:
            self._spoiled = self._spoiled or not _is_unicode(chunk)
            parts.append(chunk)
            length += len(chunk)
            if length > min(2 * len(self.text), LONGEST_RECORD_BYTES):
                break
        grown = length > len(self.text)
        self.text = "".join(parts)
        return grown


def _decoded(chunks: Iterable[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    yield from map(decoder.decode, chunks)
    yield decoder.decode(b"", final=True)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
