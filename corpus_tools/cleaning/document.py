"""One document through the rules: what is left of it, and what was taken away by which rule."""

from __future__ import annotations

from dataclasses import dataclass

from corpus_tools.cleaning.characters import Text
from corpus_tools.cleaning.contamination import EvaluationIndex
from corpus_tools.cleaning.rules import Rules

DOCUMENT, LINE, MASK = "document", "line", "mask"  # what a rule took away
EMPTY, LINES_DROPPED, CONTAMINATION = "empty", "lines_dropped", "contamination"  # labels beside those of the file


@dataclass(frozen=True)
class Removal:
    """One thing a rule took away: a whole document, a line, or personal data that was masked."""

    label: str
    kind: str
    text: str
    note: str = ""
    text_bytes: int = -1  # where other rules took away some of `text` before

    @property
    def num_bytes(self) -> int:
        return len(self.text.encode()) if self.text_bytes < 0 else self.text_bytes


@dataclass(frozen=True)
class Kept:
    """What is left of a document, and its words as they were before masking."""

    text: str
    words: list[str]


def clean_document(text: str, rules: Rules, evaluation: EvaluationIndex) -> tuple[Kept | None, list[Removal]]:
    """The cleaned document, or None where it goes; and what was removed.

    Order: lines, then questions about what is left of the document, then contamination, then masking.
    """
    kept, removals = _clean_lines(text, rules)
    if kept is None:
        return None, removals
    document = Text(kept)
    for rule in rules.documents:
        if rule.removes(document):
            return None, [*removals, Removal(rule.label, DOCUMENT, kept)]
    found = evaluation.overlap(document.tokens)
    if found is not None:
        return None, [*removals, Removal(CONTAMINATION, DOCUMENT, kept, found)]
    for mask in rules.mask:
        if document.contains(mask.requires):
            kept, masked = mask.apply(kept)
            removals += (Removal(mask.name, MASK, match) for match in masked)
    return Kept(kept, document.tokens), removals


def _clean_lines(text: str, rules: Rules) -> tuple[str | None, list[Removal]]:
    lines = text.split("\n")
    kept: list[str] = []
    removals: list[Removal] = []
    for line in lines:
        label = _line_rule(line, rules) if line.strip() else None
        if label is None:
            kept.append(line)
        else:
            removals.append(Removal(label, LINE, line))
    num_lines = sum(1 for line in lines if line.strip())
    if not num_lines:
        return None, [Removal(EMPTY, DOCUMENT, text)]
    cleaned = "\n".join(kept).strip()
    if len(removals) > rules.lines.max_dropped_share * num_lines or not cleaned:
        note = f"{len(removals)} of {num_lines} lines fell"
        return None, [*removals, Removal(LINES_DROPPED, DOCUMENT, text, note, len(cleaned.encode()))]
    return cleaned, removals


def _line_rule(line: str, rules: Rules) -> str | None:
    """The first rule that takes the line away."""
    text = Text(line)
    return next((rule.label for rule in rules.lines.rules if rule.removes(text)), None)
