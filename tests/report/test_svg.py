"""The kit of pictures: everything is escaped, numbers stay short, and nobody writes elements by hand."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from engine.report.svg import element, group, line, picture, rect, standalone, text

ROOT = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"
PRINTABLE = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffe\uffff"))


@given(PRINTABLE, PRINTABLE)
def test_any_words_come_back(words: str, hint: str) -> None:
    body = [group(text(1, 2, words, "title"), hint=hint), rect(0, 0, 1, 1, style=hint)]
    root = ElementTree.fromstring(standalone(picture(10, 10, words, body)))
    shown = next(root.iter(f"{SVG}text"))
    assert (shown.text or "") == words == root.get("aria-label", "")
    assert [found.text for found in root.iter(f"{SVG}title")] == ([hint] if hint else [])
    assert next(root.iter(f"{SVG}rect")).get("style", "") == hint


def test_attributes() -> None:
    assert element("a", class_="b", text_anchor="end", left_out="", x=0, y=1.0, z=2 / 3) == \
        '<a class="b" text-anchor="end" x="0" y="1" z="0.67"/>'
    assert line(0, 1.5, 2, -0.001, "grid") == '<line class="grid" x1="0" y1="1.5" x2="2" y2="0"/>'
    assert text(1, 2, "<&>", anchor="middle") == '<text x="1" y="2" text-anchor="middle">&lt;&amp;&gt;</text>'


def test_pictures_are_made_of_the_kit() -> None:
    by_hand = [path.relative_to(ROOT) for path in (ROOT / "engine").rglob("*.py")
               if path.name != "svg.py" and any(f"<{name}" in path.read_text(encoding="utf-8")
                                                for name in ("svg ", "rect", "text ", "line ", "path ", "circle"))]
    assert not by_hand
