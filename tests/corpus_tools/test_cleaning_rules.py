"""Rules of `octant data clean` that judge code, likelihood and the lines of an interface."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from corpus_tools.cleaning.characters import Text
from corpus_tools.cleaning.interface import Interface
from corpus_tools.cleaning.rule import Alphanumeric, LineLengths, Perplexity, Rule
from engine.errors import RequestError


def _holds(rule: Rule, text: str) -> bool:
    return rule.removes(Text(text))


def test_rules_for_code() -> None:
    good = "def area(radius):\n    return 3.14 * radius ** 2\n"
    assert not _holds(Alphanumeric(rule="alphanumeric"), good)
    assert _holds(Alphanumeric(rule="alphanumeric"), "[[-, -, 0], [-, -, 1]], " * 9)
    lengths = LineLengths(rule="line_lengths", max_mean=60, max=200)
    assert not _holds(lengths, good) and not _holds(lengths, "x" * 150 + good * 3)
    assert _holds(lengths, good + "x" * 201) and _holds(lengths, "x" * 61)


def test_perplexity_by_kenlm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What it is asked, and that a missing model or package is said; the package itself is somebody else's."""
    asked = []

    class Model:
        def __init__(self, path: str) -> None:
            if not Path(path).exists():
                raise OSError("Cannot read model")

        def perplexity(self, text: str) -> float:
            asked.append(text)
            return 900.0 if "qzx" in text else 80.0

    (tmp_path / "good.arpa").touch()
    rule = Perplexity(rule="perplexity", model=str(tmp_path / "good.arpa"), max=500)
    monkeypatch.setitem(sys.modules, "kenlm", None)
    with pytest.raises(RequestError, match="pip install kenlm"):
        _holds(rule, "x")
    monkeypatch.setitem(sys.modules, "kenlm", SimpleNamespace(Model=Model))
    assert _holds(rule, "Qzx, 好") and not _holds(rule, "A text.") and not _holds(rule, "…")
    assert asked == ["qzx 好", "a text"]
    with pytest.raises(RequestError, match="cannot load its model"):
        _holds(Perplexity(rule="perplexity", model="none.arpa", max=2), "x")


def test_lines_of_an_interface() -> None:
    words = ("reply", "sign in", "comments", "评论", "登录", "来源")
    rule = Interface(rule="interface", words=words, fillers=("to", "的", "页", "第"), max_words=6)
    goes = ["Reply to comments", "Sign in to reply.", "12 comments", "Comments: about the old bridge", "登录 评论",
            "来源｜某报", "第3页评论"]
    stays = ["Reply.", "He did not sign in", "comments of the old king", "to the 的", "评论页码表",
             "Comments: he had none.", "reply = comments()", "comments " * 7]
    assert [text for text in goes if not _holds(rule, text)] == []
    assert [text for text in stays if _holds(rule, text)] == []
