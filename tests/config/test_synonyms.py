"""The table of other trainers' names: every row leads to a key, and docs/coming-from.md prints it."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config.problems import dotted_keys
from engine.config.synonyms import PROJECTS, ROWS, Row, ours

PAGE = Path(__file__).resolve().parents[2] / "docs" / "coming-from.md"


def printed(row: Row) -> str:
    cells = [f"`{row.key}`" + (f": {row.note}" if row.note else "")]
    cells += ["<br>".join(f"`{name}`" for name in row.names(project)) for project in range(len(PROJECTS))]
    return "| " + " | ".join(cells) + " |"


def test_the_page_prints_the_table() -> None:
    lines = [f"| Octant | {' | '.join(PROJECTS)} |", "|---" * (len(PROJECTS) + 1) + "|", *map(printed, ROWS)]
    assert "\n".join(lines) + "\n" in PAGE.read_text(encoding="utf-8"), "\n" + "\n".join(lines)


def test_every_row_leads_to_a_key() -> None:
    known = {*dotted_keys(), "model.preset"}
    assert [row.key for row in ROWS if row.key not in known] == []
    assert len({row.key for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize(("name", "key"), [
    ("--tensor-model-parallel-size", "parallel.tensor"), ("TP", "parallel.tensor"), ("clip-grad", "optim.grad_clip"),
    ("validation.freq", "eval.every"), ("checkpoint.interval", "checkpoint.every"), ("eval.interval", "eval.every"),
    ("num_key_value_heads", "model.num_kv_heads"), ("optimizer.lr", "optim.lr"), ("nonsense", None), ("", None),
])
def test_names_are_found_however_they_are_written(name: str, key: str | None) -> None:
    row = ours(name)
    assert (row.key if row else None) == key
