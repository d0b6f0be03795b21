"""Documents out of records, pages, papers and dumps; and a classifier of good and bad text."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from corpus_tools.cleaning.characters import Text
from corpus_tools.cleaning.rule import FastText
from corpus_tools.extract import body_text, tex_text
from engine import cli
from tests.kit.planted import Writer


def run(folder: Path, records: list[Any], *options: str, suffix: str = ".jsonl") -> list[str]:
    file, out = folder / f"in{suffix}", folder / "out.jsonl.gz"
    file.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))
    assert cli.run(["data", "extract", str(file), "--output", str(out), "--overwrite", *options]) == 0
    return [json.loads(line)["text"] for line in gzip.decompress(out.read_bytes()).splitlines()]


def test_records_by_their_metadata(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"text": "a", "meta": {"lang": "en", "score": 3}}, {"text": "b", "meta": {"lang": "de", "score": 9}},
               {"text": "c", "meta": {"lang": "zh", "score": "2.5"}}, {"text": "d", "meta": {"lang": "en"}},
               {"text": "e", "meta": {"lang": "en", "score": None}}, '{"text": ', {"text": "f", "meta": []}]
    assert run(tmp_path, records) == ["a", "b", "c", "d", "e", "f"]
    assert "1 that cannot be read" in capsys.readouterr().out
    assert run(tmp_path, records, "--keep", "meta.lang=en,zh") == ["a", "c", "d", "e"]
    assert run(tmp_path, records, "--keep", "meta.lang=en,zh", "--at-least", "meta.score=2.5") == ["a", "c"]
    assert run(tmp_path, records, "--at-most", "meta.score=3") == ["a", "c"]
    command = ["data", "extract", str(tmp_path / "in.jsonl"), "--output"]
    for wrong in (["--keep", "lang"], ["--at-least", "n=x"]):
        assert cli.run([*command, str(tmp_path / "x.jsonl"), *wrong]) == 2
    assert cli.run([*command, str(tmp_path / "out.jsonl.gz")]) == 2, "it is there"


def test_a_paper() -> None:
    source = r"""\documentclass{article}
\newcommand{\model}{Octant {v1}} % a name
\def\N{\mathbb{N}}
\newcommand{\pair}[1]{(#1, #1)}
\begin{document}\begin{abstract}Left out.\end{abstract}
\section{Method} % nobody reads this
%% a line of comment
We train \model{} on 50\% of $\N$, not \models; \pair{x}.
\begin{thebibliography}{9}\bibitem{a} A.\end{thebibliography}
\end{document}"""
    assert tex_text(source) == (
        "\\section{Method} \nWe train Octant {v1} on 50\\% of $\\mathbb{N}$, not \\models; \\pair{x}.")
    assert tex_text("\\section{A} b \\end{document} c") == "\\section{A} b" and tex_text("no section") == ""


def test_a_dump_gives_each_question_its_best_answer(tmp_path: Path) -> None:
    def row(number: int, kind: int, score: int, body: str, **more: object) -> str:
        attributes = {"Id": number, "PostTypeId": kind, "Score": score, "Body": body, **more}
        return "<row " + " ".join(f'{key}="{value}"' for key, value in attributes.items()) + " />"

    rows = [row(1, 1, 5, "&lt;p&gt;How &amp;amp; why?&lt;/p&gt;", Title="Why so"), row(2, 2, 1, "low", ParentId=1),
            row(3, 2, 7, "&lt;p&gt;Because.&lt;/p&gt;&lt;pre&gt;x = 1&lt;/pre&gt;", ParentId=1),
            row(4, 2, 7, "later", ParentId=1), row(5, 1, 0, "nobody answered", Title="Alone"), row(6, 5, 0, "a wiki")]
    (tmp_path / "Posts.xml").write_text("<?xml version='1.0'?><posts>" + "".join(rows) + "</posts>")
    out = tmp_path / "out.jsonl"
    assert cli.run(["data", "extract", str(tmp_path / "Posts.xml"), "--output", str(out)]) == 0
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == [
        "Why so\n\nHow & why?\n\nBecause.\n\nx = 1"]
    assert body_text("<p>a<br>b</p><ul><li>c</li></ul>") == "a\nb\n\nc"
    (tmp_path / "Posts.xml").write_text("<posts><row")
    assert cli.run(["data", "extract", str(tmp_path / "Posts.xml"), "--output", str(tmp_path / "y.jsonl")]) == 2
    assert not list(tmp_path.glob("y.jsonl*"))


def test_a_page(tmp_path: Path) -> None:
    pytest.importorskip("trafilatura", reason="pip install trafilatura")
    story = [Writer(seed).text() for seed in range(3)]
    page = ("<html><body><nav><a href='/'>Home</a> <a href='/login'>Log in</a></nav><article><h1>Title</h1>"
            + "".join(f"<p>{part}</p>" for part in story) + "</article><footer>Cookie notice</footer></body></html>")
    [text] = run(tmp_path, [{"html": page}, {"html": "<html></html>"}], "--kind", "html", "--field", "html")
    assert story[1].split("\n")[0] in text and "Log in" not in text and "Cookie" not in text


def test_a_classifier_tells_what_it_was_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fasttext", reason="pip install fasttext-wheel")
    for name, words in (("good", "the river flows past the old mill"), ("bad", "click buy now cheap pills casino")):
        lines = [json.dumps({"text": f"{words} {i % 7} {words}"}) for i in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    command = ["data", "classifier", "--good", str(tmp_path / "good.jsonl"), "--bad", str(tmp_path / "bad.jsonl")]
    assert cli.run([*command, "--output", str(tmp_path / "q.bin")]) == 0
    assert "100.0% of the good and 100.0% of the bad" in capsys.readouterr().out
    rule = FastText(rule="fasttext", model=str(tmp_path / "q.bin"), keep=("good",), min_probability=0.5)
    assert rule.removes(Text("buy cheap pills")) and not rule.removes(Text("past the old mill"))
