"""The settings in a `config.json`, each of the type it must have, with the defaults of the class that reads it.

In `transformers` a key that is not there has the default of its configuration class.  So it has here; and a value of
another type than the class declares is refused by name, as it is there.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from engine.reading import shown

LARGEST = 2**31 - 1                     # of a size; beyond it, products of sizes are no longer sizes


@dataclass(frozen=True)
class Settings:
    """What a file says, over what its class takes for granted.

    Every method raises CheckpointError, with file and key, where the value is not of its kind.
    """

    path: Path
    values: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)          # of keys that the file has under another name

    def over(self, defaults: Mapping[str, Any], names: Mapping[str, str | None]) -> Settings:
        """With the defaults of a class and its own names for some keys; where that is null, it has no such key."""
        own = {theirs: key for key, theirs in names.items() if theirs is not None}
        absent = {key for key, theirs in names.items() if theirs is None}
        stated = {own.get(key, key): value for key, value in self.values.items() if key not in absent}
        return Settings(self.path, {**defaults, **stated}, {key: theirs for theirs, key in own.items()})

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def count(self, key: str, least: int = 1) -> int:
        """A whole number."""
        value = self.values.get(key)
        if type(value) is not int or not least <= value <= LARGEST:
            raise self.refuse(key, f"which is not a whole number from {least} to {LARGEST:,}")
        return value

    def count_or(self, key: str, other: int) -> int:
        """The same, or `other` where it is null."""
        return other if self.values.get(key) is None else self.count(key)

    def number(self, key: str) -> float:
        """A finite number above 0."""
        value = self.values.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
            raise self.refuse(key, "which is not a number above 0")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; null is false."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(key, "which is not true or false")
        return bool(value)

    def section(self, key: str) -> Settings | None:
        """An object with keys of its own; None where it is null or empty."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.refuse(key, "which is not an object")
        return Settings(self.path, value) if value else None

    def token_ids(self, key: str, vocab_size: int) -> list[int]:
        """One id or several, each below `vocab_size`; none where it is null."""
        value = self.values.get(key)
        found = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token_id) is int and 0 <= token_id < vocab_size for token_id in found):
            raise self.refuse(key, f"which is outside the vocabulary of {vocab_size:,} ids")
        return found

    def refuse(self, key: str, why: str) -> CheckpointError:
        """The error that names file, key and value."""
        value = shown(self.values[key]) if key in self.values else "missing"
        return CheckpointError(f"{self.path}: {self.names.get(key, key)} is {value}, {why}")
