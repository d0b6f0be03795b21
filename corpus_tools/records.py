"""A record and the document in it, or why there is none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from engine.reading import shown

MOST_NAMES_SHOWN = 20


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used: which file, where in it, and why."""

    path: str
    where: str
    why: str
    count: int = 1  # so many of them, where one cause spoils several

    def __str__(self) -> str:
        return f"{self.path}, {self.where}: {self.why}" if self.where else f"{self.path}: {self.why}"


def text_of(record: Any, text_field: str) -> str:
    """The document of a record; `a.b` is field `b` of the object in field `a`.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    text = record[text_field] if text_field in record else _nested(record, text_field)
    if isinstance(text, list) and all(isinstance(part, str) for part in text):
        text = "\n".join(text)
    if isinstance(text, bytes):  # a binary column
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"field {text_field!r} holds bytes that are no UTF-8 (byte {error.start})") from error
    if not isinstance(text, str):
        raise ValueError(f"field {text_field!r} holds {_kind(text)}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"field {text_field!r} holds half of a surrogate pair (a broken \\u escape)") from error
    return text


def _nested(record: dict[str, Any], text_field: str) -> Any:
    value: Any = record
    for name in text_field.split("."):
        if not isinstance(value, dict) or name not in value:
            fields = names(record) or "(none)"
            raise ValueError(f"no field {text_field!r} (see --field); its fields are {fields}")
        value = value[name]
    return value


def names(found: Iterable[str]) -> str:
    """Names out of a file, for a message: printable, and not too many."""
    return ", ".join(shown(name)[1:-1] for name in islice(found, MOST_NAMES_SHOWN))


def _kind(value: Any) -> str:
    return "a number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__
