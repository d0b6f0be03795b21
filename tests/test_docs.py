"""The documentation hangs together: an index of all of it, links that lead somewhere, commands that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from engine.cli import build_parser
from tests.reliability.test_faults import FAULTS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def links(path: Path) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text(path)) if "://" not in link]


def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings."""
    titles = re.findall(r"^#+ (.+)$", text(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(path: Path) -> list[str]:
    """The `octant …` lines of its code blocks that are no patterns (`…`, `a|b`), with their continuation lines."""
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text(path), re.MULTILINE | re.DOTALL))
    lines = re.findall(r"^(?:\$ )?(?:[A-Z_]+=\S+ )*octant ([^\n]+)$", blocks.replace("\\\n", " "), re.MULTILINE)
    return [line for line in lines if not re.search(r"…|\[|\w\|\w|^\w+: ", line)]


def test_the_index_names_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    assert sorted(link for link in links(index) if "/" not in link) == [path.name for path in PAGES if path != index]


def test_every_fault_has_a_proof() -> None:
    """Each row of the table names tests, and faults of theirs, that are there; and no fault is left out of it."""
    table = text(ROOT / "docs" / "operations.md").partition("## Fault by fault")[2]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2 - 1:]
    proved: set[str] = set()
    for row in rows:
        *cells, proofs = row.strip("| ").split(" | ")
        found = re.findall(r"`([\w/]+\.py)::(\w+)(?:\[([^\]`]+)\])?`", proofs)
        assert found and len(cells) >= 3 and all(cells[:3]), row
        for path, test, fault in found:
            assert re.search(rf"^def {test}\(", text(ROOT / "tests" / path), re.MULTILINE), f"{path}::{test}"
            proved |= {fault} if fault else set()
    assert len(rows) >= 30 and proved == set(FAULTS), proved ^ set(FAULTS)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    for link in links(path):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize(("page", "line"), [(path.name, line) for path in PAGES for line in commands(path)])
def test_commands_parse(page: str, line: str) -> None:
    words = shlex.split(re.split(r" [|>] | \|\| | && ", line)[0], comments=True)
    build_parser().parse_args(words)
