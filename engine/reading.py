"""Files that somebody else wrote: read within bounds, or refused in one sentence.

A folder may hold anything under the name that is looked for: a pipe that never ends, a pointer of Git LFS, gigabytes of
brackets.  So a file is looked at before it is opened, its size before it is read, and what it holds before it is used;
every refusal is a `ValueError` that says what is there instead, for the caller to put the path before it.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import stat
from pathlib import Path
from typing import Any

from engine.errors import OctantError

MOST_BYTES = 256 << 20                  # of a file that is read whole; the index of a model of 10,000 tensors has 1 MB
SHOWN = 80                              # characters of a foreign value that a message repeats
LONGEST_SAID = 300                      # characters of a library's message
LFS_POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\n(?:.*\n)*?size (\d{1,18})\n")
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
         stat.S_IFBLK: "a device"}


def read_object(path: Path, what: str, error: type[OctantError], most: int = MOST_BYTES) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        what: what it should be, for the message, such as `the configuration of a model`.
        error: raised with path and reason where it is none.
        most: bytes; a larger file is refused unread.
    """
    try:
        return parse_object(read_bytes(path, most))
    except (OSError, ValueError) as reason:
        text = reason.strerror if isinstance(reason, OSError) and reason.strerror else reason
        raise error(f"{path} cannot be read as {what}: {text}") from None


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """All of a regular file.

    Raises:
        ValueError: it is none, is larger than `most`, or a pointer to a file that was not fetched.
        OSError: it is not there, or may not be read.
    """
    size = regular_size(path)
    if size > most:
        raise ValueError(f"it has {size:,} bytes, and no more than {most:,} are read")
    data = path.read_bytes()
    require_fetched(data)
    return data


def regular_size(path: Path) -> int:
    """Bytes of a regular file; opening anything else may wait for ever.

    Raises:
        ValueError: it is something else.  OSError: it is not there.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"it is {KINDS.get(stat.S_IFMT(found.st_mode), 'no regular file')}")
    return found.st_size


def require_fetched(head: bytes) -> None:
    """
    Raises:
        ValueError: a file that begins so is a pointer of Git LFS, in the place of the file that is meant.
    """
    pointer = LFS_POINTER.match(head[:1024])
    if pointer is not None:
        raise ValueError(f"it is a Git LFS pointer to a file of {int(pointer[1]):,} bytes that was not fetched; run "
                         "`git lfs pull` in its folder")


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object out of UTF-8 text.

    Raises:
        ValueError: it is none, or one that goes deeper, or has longer numbers, than Python reads.
    """
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start:,} is no UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error}") from None
    except ValueError:
        raise ValueError("it holds a number of thousands of digits") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds {shown(value)}, not an object")
    return value


def shown(value: object) -> str:
    """A foreign value in a message: as Python writes it, without its depths, on one short line."""
    try:
        text = _Short().repr(value)
    except ValueError:                                                  # a number of thousands of digits
        text = f"a number of the type {type(value).__name__}"
    return text if len(text) <= 2 * SHOWN else text[:2 * SHOWN] + "…"


def said(error: BaseException) -> str:
    """What a library says of a foreign file, on one printable line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return text if len(text) <= LONGEST_SAID else text[:LONGEST_SAID] + "…"


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxdict = self.maxlist = self.maxtuple = 8
        self.maxstring = self.maxlong = self.maxother = SHOWN
