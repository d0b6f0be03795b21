"""What each rule removed, with examples: as JSON for programs and Markdown for people."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from corpus_tools.cleaning.document import DOCUMENT, LINE, MASK, Removal
from engine.writing import write_whole

EXCERPT_CHARACTERS = 160
REPORT, REPORT_TEXT = "_report.json", "report.md"


@dataclass(frozen=True)
class Example:
    """Something a rule removed, and where it stood."""

    source: str
    text: str
    note: str = ""


@dataclass
class Removed:
    """What one rule removed."""

    documents: int = 0
    lines: int = 0
    masked: int = 0
    text_bytes: int = 0
    examples: list[Example] = field(default_factory=list)

    def merge(self, other: Removed, num_examples: int) -> None:
        """Add what the same rule removed elsewhere."""
        self.documents += other.documents
        self.lines += other.lines
        self.masked += other.masked
        self.text_bytes += other.text_bytes
        self.examples = (self.examples + other.examples)[:num_examples]


@dataclass
class Report:
    """The whole of a cleaning run; of each rule's removals the first `num_examples` in the corpus's order are shown."""

    num_examples: int = 5
    documents_in: int = 0
    documents_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    unusable_records: int = 0
    unusable_examples: list[str] = field(default_factory=list)
    rules: dict[str, Removed] = field(default_factory=dict)
    made_from: str = ""  # a hash of files, rules and options

    def count(self, removals: Iterable[Removal], source: str) -> None:
        """Book removals from one document."""
        for removal in removals:
            entry = self.rules.setdefault(removal.label, Removed())
            entry.documents += removal.kind == DOCUMENT
            entry.lines += removal.kind == LINE
            entry.masked += removal.kind == MASK
            entry.text_bytes += removal.num_bytes
            if len(entry.examples) < self.num_examples:
                entry.examples.append(Example(source, _excerpt(removal.text), removal.note))

    def merge(self, other: Report) -> None:
        """Add the report of another stretch of the corpus."""
        self.documents_in += other.documents_in
        self.documents_out += other.documents_out
        self.bytes_in += other.bytes_in
        self.bytes_out += other.bytes_out
        self.unusable_records += other.unusable_records
        self.unusable_examples = (self.unusable_examples + other.unusable_examples)[: self.num_examples]
        for label, removed in other.rules.items():
            self.rules.setdefault(label, Removed()).merge(removed, self.num_examples)

    def write(self, folder: Path) -> None:
        """`_report.json` and `report.md` in the folder."""
        (folder / REPORT_TEXT).write_text(self.markdown(), encoding="utf-8")
        write_whole(folder / REPORT, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @staticmethod
    def read(folder: Path) -> Report | None:
        """The report in a folder, without its examples; None where there is none."""
        try:
            fields = json.loads((folder / REPORT).read_bytes())
            rules = {label: Removed(**{**removed, "examples": []}) for label, removed in fields.pop("rules").items()}
            return Report(**fields, rules=rules)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def summary(self) -> str:
        """One line."""
        share = 100 * self.bytes_out / max(1, self.bytes_in)
        return (
            f"{self.documents_in:,} documents, {self.bytes_in / 1e6:,.1f} MB -> "
            f"{self.documents_out:,} documents, {self.bytes_out / 1e6:,.1f} MB ({share:.1f} % of the text kept)"
        )

    def table(self) -> list[str]:
        """What each rule removed, most text first, as rows of a Markdown table."""
        rows = ["| rule | documents | lines | masked | bytes |", "|---|--:|--:|--:|--:|"]
        for label, removed in self._ordered():
            counts = (removed.documents, removed.lines, removed.masked, removed.text_bytes)
            rows.append(f"| {label} | " + " | ".join(f"{count:,}" if count else "" for count in counts) + " |")
        return rows

    def markdown(self) -> str:
        """The report for people."""
        lines = ["# What was removed", "", self.summary(), "", *self.table()]
        if self.unusable_records:
            lines += ["", f"{self.unusable_records:,} unusable records were skipped, such as:", ""]
            lines += [f"- {example}" for example in self.unusable_examples]
        for label, removed in self._ordered():
            lines += ["", f"## {label}", ""]
            for example in removed.examples:
                note = f" ({example.note})" if example.note else ""
                lines.append(f"- {example.source}{note}: `{example.text.replace('`', chr(39))}`")
        return "\n".join(lines) + "\n"

    def _ordered(self) -> list[tuple[str, Removed]]:
        return sorted(self.rules.items(), key=lambda item: (-item[1].text_bytes, item[0]))


def _excerpt(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= EXCERPT_CHARACTERS else flat[:EXCERPT_CHARACTERS] + " …"
