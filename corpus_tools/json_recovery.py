"""Where does the next record begin, behind one that is no JSON?

Nobody can tell for sure, since what is missing may be a quote, a bracket or half the file.  Two signs are good:

1. The broken record's own brackets close (as in `{"text": oops}`), and what stands behind them may follow a record.
   Strings are passed over whole; as none may hold a line end, one that does is the broken part itself.
2. A later line begins with `{`, no further in than the record's own line began: the next line of JSON lines, the next
   record of an indented list.

Where neither holds, the next record is a `{` behind a comma or a closing bracket that goes on as the broken record did,
with the same first key; or else one that begins a whole object.  That is the last resort because such an object may lie
inside of the broken record.
"""

from __future__ import annotations

import json
import re
import sys
from itertools import islice

FARTHEST_END, MOST_TOKENS = 1 << 24, 100_000  # how far the closing bracket of a broken record is looked for
MOST_TRIES = 200  # objects that are tried behind a broken record
OVERLAP = 64  # characters kept when a window holds no sign: a sign may have begun

TOKENS = re.compile(
    r'"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+(?P<closed>"?)'
    r"|(?P<open>[{\[])|(?P<close>[}\]])"
    r"|\n(?P<indent>[ \t\r]*)(?P<next>\{)?"
)
PAIRS = {"{": "}", "[": "]"}
FOLLOWING = {  # what may stand behind a record, in a list and in a row
    True: re.compile(r"[ \t\r]*(?:[,\]\n]|\Z)"),
    False: re.compile(r"[ \t\r]*(?:[{\[\n]|\Z)"),
}
INSIDE_OUT = re.compile(r'\{\s*"\Z')  # what stands between strings, taken for a string: a quote is missing before it
FIRST_KEY = re.compile(r'\{\s*"([^"\\\n]*+(?:\\.[^"\\\n]*+)*+)"')
LONGEST_KEY, LONGEST_BLANK = 1024, 4096
CANDIDATES = re.compile(r"\n(?P<indent>[ \t\r]*)\{|[,}\]][ \t\r]*(?P<inline>\{)")


class NeedsMoreText(Exception):
    """The broken record's own brackets may close behind the text."""


def end_of_broken(text: str, error: int, column: int, in_list: bool, *, complete: bool) -> int | None:
    """The place behind the broken record that `text` begins with; None where there is no sign in `text`.

    Args:
        error: where it is wrong.
        column: characters before it on its line.
        in_list: it is an element of a list.
        complete: nothing follows `text`.

    Raises:
        NeedsMoreText: a sign may follow.
    """
    if text[:1] not in ("{", "["):
        return _end_of_words(text, in_list)
    key = first_key(text, 0)
    open_brackets: list[str] = []
    tokens = TOKENS.finditer(text, 0, FARTHEST_END)
    for token in islice(tokens, MOST_TOKENS):
        if token["open"]:
            open_brackets.append(token["open"])
        elif token["close"]:
            if PAIRS[open_brackets.pop()] != token["close"]:
                return next_record(text, error, column, in_list)
            if not open_brackets and FOLLOWING[in_list].match(text, token.end()):
                return token.end()
            if not open_brackets:
                return next_record(text, max(error, token.end()), column, in_list)
        elif token["next"] and len(token["indent"]) <= column:
            return token.end() - 1
        elif token["closed"] == "" and token.end() < min(len(text), FARTHEST_END):
            return next_record(text, max(error, token.start()), column, in_list)
        elif token["closed"] and token.end() <= error and not text[token.end() : error].strip():
            error = token.start()  # a missing quote makes a string of what is none, right before the error
        elif token["closed"] and key and INSIDE_OUT.search(token[0]) and text.startswith(f'{key}"', token.end()):
            return next_record(text, error, column, in_list)
    if len(text) < FARTHEST_END and next(tokens, None) is None and not complete:
        raise NeedsMoreText
    return next_record(text, error, column, in_list)


def _end_of_words(text: str, in_list: bool) -> int | None:
    """Behind what doesn't even begin like a record: the next record, but outside of a list no farther than its line."""
    record = next_record(text, 0, sys.maxsize, in_list)
    end = -1 if in_list else text.find("\n")
    return record if end < 0 else min(end, len(text) if record is None else record)


def next_record(text: str, start: int, column: int, in_list: bool, key: str | None = None) -> int | None:
    """The first `{` from `start` on that looks like the beginning of a record.

    `key`: the first key of records, where it is known; by default what `text` begins with.
    """
    begin = max(0, start - LONGEST_BLANK)
    start = begin + len(text[begin:start].rstrip()) - 1  # what stands before it belongs to the sign
    key = key or first_key(text, 0)
    whole: int | None = None
    tries = 0
    for found in CANDIDATES.finditer(text, max(0, start)):
        place = found.end() - 1
        if found["inline"] is None:
            if len(found["indent"]) <= column:
                return place if whole is None else whole
        elif key is not None and first_key(text, place) == key:
            return place
        elif whole is None and tries < MOST_TRIES:
            tries += 1
            whole = place if _is_object(text, place, in_list) else None
    return whole


def first_key(text: str, place: int) -> str | None:
    """The first key of the object that begins there."""
    found = FIRST_KEY.match(text, place, place + LONGEST_KEY)
    return found and found[1]


def _is_object(text: str, place: int, in_list: bool) -> bool:
    try:
        _, end = json.JSONDecoder(parse_int=float).raw_decode(text, place)
    except (ValueError, RecursionError):
        return False
    return FOLLOWING[in_list].match(text, end) is not None
