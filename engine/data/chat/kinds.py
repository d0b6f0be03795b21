"""What ways of training need the records of a file to hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from engine.data.chat.conversation import Learn

MOST_ALTERNATIVES = 64


@dataclass(frozen=True)
class Kind:
    """What records must hold for a way of training: how many alternatives, and which answers are learned."""

    name: str
    said: str
    least: int
    most: int
    learn: Learn

    def problem_of(self, num_alternatives: int) -> str | None:
        """What is wrong with a record of so many alternatives."""
        if self.least <= num_alternatives <= self.most:
            return None
        found = {1: "one answer", 2: "two answers to compare"}.get(num_alternatives, f"{num_alternatives} answers")
        return f"it has {found}, and {self.said} are needed here"


KINDS: Mapping[str, Kind] = MappingProxyType({kind.name: kind for kind in (
    Kind("conversations", "conversations of one", 1, 1, "all"), Kind("pairs", "pairs", 2, 2, "last"),
    Kind("ranked", "ranked answers", 2, MOST_ALTERNATIVES, "last"))})
