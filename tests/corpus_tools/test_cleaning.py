"""`octant data clean`: every rule finds what was planted and nothing else; the same bytes every time."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from corpus_tools.cleaning.characters import Text, profile, tokens
from corpus_tools.cleaning.contamination import evaluation_index
from corpus_tools.cleaning.document import clean_document
from corpus_tools.cleaning.duplicates import Deduplicator, Fingerprint, fingerprint
from corpus_tools.cleaning.masking import chinese_id, luhn
from corpus_tools.cleaning.pipeline import clean
from corpus_tools.cleaning.rule import (
    Digits,
    FastText,
    Keywords,
    Patterns,
    Phrases,
    RepeatedLines,
    RepeatedNgrams,
    Rule,
    Script,
    UpperCase,
    Words,
)
from corpus_tools.cleaning.rules import Contamination, Duplicates, LineRules, Rules, load_rules
from corpus_tools.prepare import prepare
from engine.commands import data as command
from engine.data.indexed import IndexedDataset
from engine.errors import ConfigError, DataError, RequestError
from tests.kit.planted import Writer, planted_corpus, score, table

rensa = pytest.importorskip("rensa")

PLAIN = Rules(duplicates=Duplicates(near=None))
NO_EVALUATION = evaluation_index([], Contamination())


def _write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def _kept(folder: Path) -> list[dict[str, str]]:
    files = sorted(folder.glob("clean-*.jsonl.gz"))
    return [json.loads(line) for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]


def _fingerprint(text: str, rules: Duplicates) -> Fingerprint:
    return fingerprint(text, tokens(text), rules)


def _holds(rule: Rule, text: str) -> bool:
    return rule.removes(Text(text))


@pytest.mark.parametrize("seed", [0, 1])
def test_every_planted_case_is_found_and_nothing_else(seed: int, tmp_path: Path) -> None:
    """Precision and recall per rule on a corpus with 20 cases each, and decoys; printed with `pytest -s`."""
    planted = planted_corpus(seed)
    corpus, evaluation = planted.write(tmp_path)
    report = clean(
        [corpus], tmp_path / "out", load_rules(), evaluation_files=[evaluation], workers=1, num_examples=1 << 30
    )
    scores = score(planted, report)
    print("\n".join(table(scores)))
    labels = {rule.label for rule in (*load_rules().lines.rules, *load_rules().documents)}
    labels |= {mask.name for mask in load_rules().mask}
    assert labels <= {s.label for s in scores if s.planted >= 20}, "every rule of the file has its cases"
    for s in scores:
        assert s.precision == 1.0 and s.recall == 1.0, s
    kept = _kept(tmp_path / "out")
    assert report.documents_out == len(kept)
    fallen = {plant.document for plant in planted.plants if not plant.text}
    assert [int(record["source"].rpartition(" ")[2]) - 1 for record in kept] == [
        index for index in range(len(planted.documents)) if index not in fallen
    ], "in order, and what is not planted stays"
    untouched = set(range(len(planted.documents))) - {plant.document for plant in planted.plants}
    texts = {int(record["source"].rpartition(" ")[2]) - 1: record["text"] for record in kept}
    assert all(texts[index] == planted.documents[index] for index in untouched)


def test_the_same_bytes_for_any_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corpus_tools.readers.BLOCK_BYTES", 30_000)
    monkeypatch.setattr("corpus_tools.cleaning.pipeline.SHARD_BYTES", 100_000)
    corpus, evaluation = planted_corpus(2, num_each=6).write(tmp_path)
    outputs = []
    for workers in (1, 3):
        out = tmp_path / f"out{workers}"
        clean([corpus], out, load_rules(), evaluation_files=[evaluation], workers=workers)
        outputs.append({path.name: path.read_bytes() for path in sorted(out.iterdir())})
    assert outputs[0] == outputs[1]
    assert {"clean-00000.jsonl.gz", "clean-00001.jsonl.gz", "report.md", "_report.json"} <= set(outputs[0])


def test_prepare_reads_the_output(tmp_path: Path) -> None:
    writer = Writer(0)
    texts = [writer.text() for _ in range(20)]
    clean([_write(tmp_path / "a.jsonl", texts)], tmp_path / "out", load_rules(), workers=1)
    prepare([tmp_path / "out"], "bytes", tmp_path / "tokens", workers=1)
    corpus = IndexedDataset(tmp_path / "tokens")
    assert [bytes(corpus.document(i)[:-1].tolist()).decode() for i in range(corpus.num_documents)] == texts


def test_what_is_removed_and_kept_adds_up(tmp_path: Path) -> None:
    """Bytes in = bytes out + bytes removed, where no mask changes lengths; line ends and blank edges aside."""
    planted = planted_corpus(3, num_each=5)
    corpus, evaluation = planted.write(tmp_path)
    rules = load_rules().model_copy(update={"mask": ()})
    report = clean([corpus], tmp_path / "out", rules, evaluation_files=[evaluation], workers=1)
    removed = sum(entry.text_bytes for entry in report.rules.values())
    line_ends = sum(text.count("\n") for text in planted.documents)
    assert report.bytes_in == sum(len(text.encode()) for text in planted.documents)
    assert 0 <= report.bytes_in - report.bytes_out - removed <= line_ends
    dropped = sum(entry.documents for entry in report.rules.values())
    assert report.documents_in - report.documents_out == dropped
    saved = json.loads((tmp_path / "out" / "_report.json").read_text())
    assert saved["rules"]["near_duplicate"]["documents"] == 5
    assert saved["rules"]["near_duplicate"]["examples"][0]["note"].startswith("copy of ")
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "## boilerplate_zh" in markdown and "corpus.jsonl, line" in markdown


def test_profile_counts_by_kind() -> None:
    found = profile("Ab 12,。+😀 汉字かな Привет\t\n")
    assert (found.letters, found.upper_case, found.digits) == (12, 2, 2)
    assert (found.punctuation, found.symbols, found.visible) == (2, 2, 18)
    assert found.scripts == {"latin": 2, "han": 2, "kana": 2, "cyrillic": 6}


def test_tokens_see_through_reformatting() -> None:
    assert tokens("The CAT, sat.") == tokens("the\ncat — sat") == ["the", "cat", "sat"]
    assert tokens("ＡＢＣ①") == ["abc1"]
    assert tokens("人工 AI 智能2024年") == ["人", "工", "ai", "智", "能", "2024", "年"]


@pytest.mark.parametrize(
    ("rule", "goes", "stays"),
    [
        (Words(rule="words", min=3), ["a b", "汉字"], ["a b c", "汉字好"]),
        (Words(rule="words", max=3), ["a b c d"], ["a b c"]),
        (UpperCase(rule="upper_case"), ["ALL CAPITALS HERE"], ["NASA", "All capitals here", "汉字" * 6]),
        (Digits(rule="digits"), ["12 34", "2024-01-31", "1,000.00 $"], ["12 apples", "---", "a1", "第12章"]),
        (Script(rule="script", keep=("han",), min_share=0.5), ["abc", "汉abc", "123", "かな汉"], ["汉字ab", "汉。1"]),
        (RepeatedLines(rule="repeated_lines", max_share=0.4), ["a\na\na\nb", "x\n\nx"], ["a\nb\nc", "a\na\nbcd"]),
        (RepeatedNgrams(rule="repeated_ngrams", n=2, max_share=0.4), ["a b a b a b"], ["a b c d e f", "a b", ""]),
        (Keywords(rule="keywords", words=("cat", "博彩")), ["A CAT.", "博彩站", "用cat吧"], ["category", "bobcat"]),
        (Keywords(rule="keywords", words=("cat",), min_count=2), ["cat, cat"], ["cat"]),
        (
            Phrases(rule="phrases", phrases=("Home", "about us", "首页", "登录")),
            ["home", "HOME | About Us  Home", "[首页] [登录]", "首页 登录", "» home (3)"],
            ["go home", "about", "首页的设计", "| 12 |", ""],
        ),
        (Patterns(rule="patterns", patterns=("^a", "b$", "cc")), ["Axx", "xB", "xCCx"], ["xa", "bx", "cxc"]),
    ],
)
def test_rules(rule: Rule, goes: list[str], stays: list[str]) -> None:
    assert [text for text in goes if not _holds(rule, text)] == []
    assert [text for text in stays if _holds(rule, text)] == []


def test_lines_fall_and_take_the_document_with_them() -> None:
    rules = Rules(lines=LineRules(max_dropped_share=0.5, rules=(Digits(rule="digits"),)))
    kept, _ = clean_document("one\n12\n\ntwo\n34", rules, NO_EVALUATION)
    assert kept is not None and kept.text == "one\n\ntwo", "exactly half may fall"
    kept, removals = clean_document("one\n12\n34", rules, NO_EVALUATION)
    assert kept is None
    assert [r.label for r in removals] == ["digits", "digits", "lines_dropped"]
    assert [r.kind for r in removals] == ["line", "line", "document"]
    assert removals[-1].note == "2 of 3 lines fell"
    assert clean_document(" \n", rules, NO_EVALUATION)[1][0].label == "empty"


def test_check_digits() -> None:
    assert luhn("4111 1111 1111 1111") and not luhn("4111 1111 1111 1112")
    assert chinese_id("11010519491231002X") and chinese_id("11010519491231002x")
    assert not chinese_id("110105194912310021") and not chinese_id("11010519491331002X")


def test_masking_is_linear_in_hostile_text() -> None:
    """Long runs that almost match must not take quadratic time."""
    for text in ("a" * 300_000, "1" * 300_000, "+1 " * 100_000, "a@" * 150_000, "1-" * 150_000, "a.b@c." * 50_000):
        for mask in load_rules().mask:
            assert mask.apply(text)[1] == []


def test_copies_of_dropped_documents_stay(tmp_path: Path) -> None:
    """A duplicate is one of a document that was kept: what a rule dropped has no claim."""
    writer = Writer(1)
    text = writer.text()
    spam = text + "\n" + "online casino viagra cialis"
    clean([_write(tmp_path / "a.jsonl", [spam, text, text])], tmp_path / "out", load_rules(), workers=1)
    assert [record["source"].rpartition(" ")[2] for record in _kept(tmp_path / "out")] == ["2"]


def test_near_duplicates_follow_the_threshold() -> None:
    writer = Writer(2)
    words = tokens(" ".join(writer.english() for _ in range(60)))
    for num_changed, near in ((5, True), (60, False)):
        edited = list(words)
        for place in writer.draw.sample(range(len(words)), num_changed):
            edited[place] = f"new{place}"
        rules = Duplicates(near=0.8)
        known = Deduplicator(rules)
        assert known.seen(_fingerprint(" ".join(words), rules), "first") is None
        expected = ("near_duplicate", "first") if near else None
        assert known.seen(_fingerprint(" ".join(edited), rules), "second") == expected


def test_short_texts_are_no_near_duplicates_of_each_other() -> None:
    rules = Duplicates()
    known = Deduplicator(rules)
    for text in ("", "a", "b", "c d e", "!!!", "???"):
        assert known.seen(_fingerprint(text, rules), text) is None
    assert known.seen(_fingerprint("A.", rules), "again") == ("exact_duplicate", "a")


def test_switching_duplicates_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    file = _write(tmp_path / "a.jsonl", ["same text"] * 3)
    with pytest.raises(RequestError, match=r"rensa: pip install 'octant\[data\]'"):
        clean([file], tmp_path / "out", Rules(), workers=1)
    assert clean([file], tmp_path / "exact", PLAIN, workers=1).documents_out == 1
    off = Rules(duplicates=Duplicates(exact=False, near=None))
    assert clean([file], tmp_path / "off", off, workers=1).documents_out == 3


def test_contamination_of_every_kind_of_evaluation_file(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    writer = Writer(3)
    questions = [" ".join(writer.english() for _ in range(3)) for _ in range(5)]
    short = "exactly eight words stand in this one line"
    (tmp_path / "a.txt").write_text(f"{questions[0]}\n\n{short}\n")
    nested = {"q": {"stem": questions[1], "n": 1}, "choices": ["x", questions[2]]}
    (tmp_path / "b.json").write_text(json.dumps([nested]))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(json.dumps({"q": questions[3]}).encode()))
    parquet.write_table(pyarrow.table({"id": [1], "q": [questions[4]]}), tmp_path / "d.parquet")
    files = [tmp_path / name for name in ("a.txt", "b.json", "c.jsonl.gz", "d.parquet")]
    index = evaluation_index(files, Contamination())
    assert (index.num_texts, index.num_too_short) == (7, 1)
    names = ["a.txt", "b.json", "b.json", "c.jsonl.gz", "d.parquet", "a.txt"]
    for question, name in zip([*questions, short], names, strict=True):
        found = index.overlap(tokens(" ".join([writer.english(), question.upper(), writer.english()])))
        assert found is not None and found.endswith(name)
    assert index.overlap(tokens(writer.text())) is None
    assert index.overlap([]) is None
    twelve = " ".join(tokens(questions[0])[:12])
    assert index.overlap(tokens(f"{twelve} and then something else")) is None
    thirteen = " ".join(tokens(questions[0])[:13])
    assert index.overlap(tokens(f"so {thirteen} it goes")) is not None
    four = evaluation_index([tmp_path / "a.txt"], Contamination(ngram=4, min_words=2))
    assert four.overlap(tokens(twelve)) is not None


def test_evaluation_files_that_cannot_be_looked_for(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short\n")
    with pytest.raises(DataError, match=r"no text of at least 8 words in .*short\.txt"):
        evaluation_index([tmp_path / "short.txt"], Contamination())
    (tmp_path / "bad.json").write_text('[{"q": "a"')
    with pytest.raises(DataError, match=r"bad\.json: line 1"):
        evaluation_index([tmp_path / "bad.json"], Contamination())


def test_the_output_folder_is_not_trampled(tmp_path: Path) -> None:
    file = _write(tmp_path / "a.jsonl", ["text"])
    out = tmp_path / "out"
    clean([file], out, PLAIN, workers=1)
    clean([file], out, PLAIN, workers=1)  # its own files may be replaced
    (out / "notes.txt").write_text("mine")
    with pytest.raises(RequestError, match=r"holds other files \(notes\.txt\)"):
        clean([file], out, PLAIN, workers=1)
    (out / "notes.txt").unlink()
    with pytest.raises(RequestError, match="holds the input"):
        clean([out], out, PLAIN, workers=1)
    assert len(_kept(out)) == 1


def test_bad_records(tmp_path: Path) -> None:
    file = _write(tmp_path / "a.jsonl", ["one text", "another"])
    file.write_text(file.read_text() + "{\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: invalid JSON"):
        clean([file], tmp_path / "out", PLAIN, workers=1)
    assert not list((tmp_path / "out").glob("*.gz")), "nothing that looks finished is left"
    report = clean([file], tmp_path / "out", PLAIN, workers=1, on_error="skip")
    assert (report.documents_out, report.unusable_records) == (2, 1)
    assert "line 3: invalid JSON" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("documents: [{rule: lenght}]", r"documents\.0.*lenght"),
        ("documents: [{rule: length, min: 3}]", r"documents\.0\.length\.min: Extra inputs"),
        ("documents: [{rule: script, keep: [english]}]", r"unknown script 'english'; known: arabic, cyrillic"),
        ("lines: {rules: [{rule: patterns, patterns: ['(']}]}", r"'\(' is not a regular expression"),
        ("documents: [{rule: patterns, patterns: ['Foo\\S']}]", r"has capitals, but texts are compared in lower case"),
        ("mask: [{name: x, pattern: '[', replacement: y}]", r"'\[' is not a regular expression"),
        ("lines: {max_dropped_share: 50}", r"max_dropped_share: Input should be less than or equal to 1"),
        ("rules: [", "cannot be read as YAML"),
    ],
)
def test_rules_files_are_read_strictly(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_rules(tmp_path / "rules.yaml")


def test_a_rules_file_that_is_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(RequestError, match=r"pipe\.yaml cannot be read as YAML: it is a pipe"):
        load_rules(tmp_path / "pipe.yaml")
    (tmp_path / "deep.yaml").write_bytes(b"[" * 100_000)
    with pytest.raises(RequestError, match=r"deep\.yaml cannot be read as YAML"):
        load_rules(tmp_path / "deep.yaml")


def test_a_missing_rules_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read rules"):
        load_rules(tmp_path / "none.yaml")


def test_fasttext_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in of the package: label and probability are compared, line ends are taken out."""
    rule = FastText(rule="fasttext", model="lid.bin", keep=("en", "zh"), min_probability=0.5)

    def predict(text: str, k: int, threshold: float, errors: str) -> list[tuple[float, str]]:
        assert text.count("\n") == 1 and text.endswith("\n")
        return {"E": [(0.9, "__label__en")], "F": [(0.9, "__label__fr")], "U": [(0.4, "__label__en")]}.get(text[0], [])

    model: Any = SimpleNamespace(f=SimpleNamespace(predict=predict))
    monkeypatch.setitem(sys.modules, "fasttext", SimpleNamespace(load_model=lambda path: model))
    assert [_holds(rule, text) for text in ("E\nx", "F", "U", "nothing")] == [False, True, True, True]
    monkeypatch.setitem(sys.modules, "fasttext", None)
    with pytest.raises(RequestError, match="needs the package fasttext"):
        _holds(FastText(rule="fasttext", model="lid.bin", keep=("en",)), "text")


def _arguments(**changes: Any) -> argparse.Namespace:
    defaults = {"action": "clean", "files": [], "output": None, "rules": None, "print_rules": False, "examples": 5,
                "decontaminate": [], "workers": 1, "field": "text", "on_error": "stop",
                "overwrite": False}  # fmt: skip
    return argparse.Namespace(**{**defaults, **changes})


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(_arguments(print_rules=True)) == 0
    (tmp_path / "my.yaml").write_text(capsys.readouterr().out)
    assert load_rules(tmp_path / "my.yaml") == load_rules()
    with pytest.raises(RequestError, match="give files and --output DIR"):
        command.run(_arguments())
    file = _write(tmp_path / "a.jsonl", [Writer(0).text(), "short"])
    arguments = _arguments(files=[str(file)], output=str(tmp_path / "out"), rules=str(tmp_path / "my.yaml"))
    assert command.run(arguments) == 0
    printed = capsys.readouterr().out
    assert "2 documents" in printed and "| words | 1 |" in printed
    assert printed.splitlines()[-1] == f"next: octant prepare {tmp_path / 'out'} --tokenizer bytes --output data/clean"
