"""A reward that costs nothing to compute and differs between texts: benchmarks of whole steps learn from it."""

from __future__ import annotations

from collections.abc import Sequence


def letters(prompts: Sequence[str], responses: Sequence[str], records: Sequence[object]) -> list[float]:
    """How many different characters a text has, in tens."""
    return [len(set(text)) / 10 for text in responses]
