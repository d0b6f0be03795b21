"""`octant prepare`: one corpus whatever the format, compression and workers."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from corpus_tools import inputs, readers
from corpus_tools.inputs import expand_inputs
from corpus_tools.prepare import prepare
from corpus_tools.readers import read_blocks, read_texts
from engine.commands import prepare as command
from engine.data.indexed import IndexedDataset
from engine.data.sidecar import Sidecar, describe_file
from engine.data.tokenizer import load_tokenizer
from engine.errors import RequestError
from tests.kit.corpora import compressed, corpus_bytes, documents_of, json_lines, write_documents
from tests.kit.texts import chinese_texts, english_texts

TEXTS = [*english_texts(6), *chinese_texts(5), "x", " lead and tail \n", "\n"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("format", [".jsonl", ".json", ".parquet"])
def test_every_format_holds_the_same_documents(format: str, suffix: str, model: str, tmp_path: Path) -> None:
    file = write_documents(tmp_path / f"corpus{format}{suffix}", TEXTS)
    counts = prepare([file], model, tmp_path / "out", workers=1)
    tokenizer = load_tokenizer(model)
    assert documents_of(tmp_path / "out") == [[*tokenizer.encode(text), tokenizer.eod_id] for text in TEXTS]
    assert counts.documents == len(TEXTS)
    assert counts.text_bytes == sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_text_file_is_one_document(suffix: str, model: str, tmp_path: Path) -> None:
    for index, text in enumerate(TEXTS):
        (tmp_path / f"{index:02d}.txt{suffix}").write_bytes(compressed(suffix)(text.encode()))
    prepare([tmp_path], model, tmp_path / "out", workers=1)
    tokenizer = load_tokenizer(model)
    assert documents_of(tmp_path / "out") == [[*tokenizer.encode(text), tokenizer.eod_id] for text in TEXTS]


@pytest.mark.parametrize("spec", ["bytes", "model"])
def test_a_long_text_is_encoded_in_fragments_with_the_same_ids(
    spec: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1000)
    spec = model if spec == "model" else spec
    text = "\n".join([*english_texts(5), *chinese_texts(5)])
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt").write_text("short", encoding="utf-8")
    prepare([tmp_path], spec, tmp_path / "out", workers=1, part_seconds=0)
    tokenizer = load_tokenizer(spec)
    blocks = list(read_blocks(expand_inputs([tmp_path / "a.txt"])[0], "text"))
    assert len(blocks) > 20 and sum(block.ends for block in blocks) == 1
    assert documents_of(tmp_path / "out") == [[*tokenizer.encode(t), tokenizer.eod_id] for t in (text, "short")]


def test_a_huge_text_becomes_several_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(readers, "LONGEST_DOCUMENT_BYTES", 5000)
    text = "\n".join(english_texts(8)) + "世" * 7000  # the last line is longer than a document may be
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    for name, join_texts in (("joined", True), ("whole", False)):
        blocks = list(read_blocks(expand_inputs([tmp_path / "a.txt"])[0], "text", join_texts))
        assert "".join(text for block in blocks for text in block.texts) == text, name
        sizes, size = [], 0
        for block in blocks:
            size = (size if block.continues else 0) + len(block.texts[0].encode())
            if block.ends:
                sizes.append(size)
        assert 2500 < max(sizes) <= 5000, name
        assert sum(sizes) == len(text.encode())


def test_blocks_depend_on_content_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 700)
    data = "\n".join(english_texts(6)).encode()
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(data))
    (tmp_path / "c.txt").write_bytes(data)
    plain, packed = (
        [(b.texts, b.continues, b.ends) for b in read_blocks(file, "text")]
        for file in expand_inputs([tmp_path / "a.txt", tmp_path / "b.txt.gz"])
    )
    assert plain == packed
    monkeypatch.setattr(inputs, "READ_BYTES", 97)
    again = [(b.texts, b.continues, b.ends) for b in read_blocks(expand_inputs([tmp_path / "c.txt"])[0], "text")]
    assert again == plain


def test_the_same_bytes_for_any_number_of_workers(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr("corpus_tools.prepare.BYTES_PER_WORKER", 1)
    (tmp_path / "long.txt").write_text("\n".join(english_texts(20)), encoding="utf-8")
    write_documents(tmp_path / "many.jsonl.gz", [*TEXTS, *chinese_texts(300, seed=2)])
    results = []
    for workers in (1, 2, 3):
        prepare([tmp_path / "long.txt", tmp_path / "many.jsonl.gz"], model, tmp_path / f"out{workers}", workers=workers)
        results.append(corpus_bytes(tmp_path / f"out{workers}"))
    assert results[0] == results[1] == results[2]


def test_side_file(model: str, tmp_path: Path) -> None:
    prepare([write_documents(tmp_path / "a.jsonl", TEXTS)], model, tmp_path / "out", workers=1)
    sidecar, tokenizer = Sidecar.read(tmp_path / "out"), load_tokenizer(model)
    assert sidecar is not None
    assert (sidecar.tokenizer.sha256, sidecar.tokenizer.vocab_size) == (tokenizer.sha256, 1000)
    assert (sidecar.tokenizer.kind, sidecar.tokenizer.name) == ("sentencepiece", "tok.model")
    assert sidecar.tokenizer.eod_id == 2
    corpus = IndexedDataset(tmp_path / "out")
    assert (sidecar.num_documents, sidecar.num_tokens) == (len(TEXTS), corpus.num_tokens)
    assert (sidecar.dtype, corpus.dtype) == ("uint16", np.dtype("<u2"))
    assert sidecar.files == {suffix: describe_file(f"{tmp_path / 'out'}{suffix}") for suffix in (".bin", ".idx")}
    assert not (tmp_path / "out.parts").exists()


def test_without_end_of_document(tmp_path: Path) -> None:
    file = write_documents(tmp_path / "a.jsonl", ["ab", "c"])
    prepare([file], "bytes", tmp_path / "out", workers=1, append_eod=False)
    assert documents_of(tmp_path / "out") == [[97, 98], [99]]


def test_fields_and_lists_of_strings(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"lines": ["ab", "c"]}, {"lines": "d"}, {"lines": []}]))
    counts = prepare([tmp_path / "a.json"], "bytes", tmp_path / "out", workers=1, text_field="lines")
    assert list(read_texts([tmp_path / "a.json"], "lines")) == ["ab\nc", "d", ""]
    assert (counts.documents, counts.empty_documents) == (2, 1)


def test_json_that_is_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "READ_BYTES", 7)
    texts = ["a", "b" * 100, "世界 \\ \" \u2028 end", "", "c"]
    (tmp_path / "lines.json").write_bytes(json_lines(texts))
    (tmp_path / "list.json").write_text(json.dumps([{"text": text, "n": [1.5, None, {"x": True}]} for text in texts]))
    (tmp_path / "pretty.json").write_text("\n".join(json.dumps({"text": text}, indent=4) for text in texts))
    for name in ("lines", "list", "pretty"):
        assert list(read_texts([tmp_path / f"{name}.json"])) == texts


def test_byte_order_marks_and_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json_lines(["a"]) + b"\r\n\n  \n" + json_lines(["b"]))
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbftext\r\n")
    assert list(read_texts([tmp_path / "a.jsonl", tmp_path / "b.txt"])) == ["a", "b", "text\r\n"]


def test_inputs_are_files_folders_and_globs(tmp_path: Path) -> None:
    names = ["b.jsonl", "a.txt", "sub/c.jsonl.gz", "sub/d.md"]
    (tmp_path / "sub").mkdir()
    for name in names:
        (tmp_path / name).write_bytes(b"x")

    def found(*files: str) -> list[str]:
        return [str(Path(file.path).relative_to(tmp_path)) for file in expand_inputs(tmp_path / f for f in files)]

    assert found(".") == ["a.txt", "b.jsonl", "sub/c.jsonl.gz"]
    assert found("b.jsonl", ".") == ["b.jsonl", "a.txt", "sub/c.jsonl.gz"], "each once, in the order given"
    assert found("**/*.gz", "a.*") == ["sub/c.jsonl.gz", "a.txt"]
    for bad, message in (("none", "does not exist"), ("*.csv", "does not exist"), ("sub/d.md", "unknown format")):
        with pytest.raises(RequestError, match=message):
            found(bad)
    with pytest.raises(RequestError, match="holds no"):
        found("sub/*.md")


def test_side_files_are_no_input(tmp_path: Path) -> None:
    """Preparing a folder into itself, and again after a kill, reads neither the corpus's side file nor its parts'."""
    write_documents(tmp_path / "a.jsonl", ["one", "two"])
    for _ in range(2):
        counts = prepare([tmp_path], "bytes", tmp_path / "a", workers=1)
        assert counts.documents == 2
        (tmp_path / "a.parts").mkdir()
        for suffix in (".json", ".bin", ".idx"):
            (tmp_path / "a.parts" / f"part-00000{suffix}").write_text("{}")
        assert [Path(file.path).name for file in expand_inputs([tmp_path / "**" / "*"])] == ["a.jsonl"]


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("ab", "cd"):  # the second time nothing of the first may be taken for it
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(json_lines([text]))))
        prepare(["-"], "bytes", tmp_path / "out", workers=1, overwrite=True)
        assert documents_of(tmp_path / "out") == [[*text.encode(), 256]]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["one", "", "two"]) + b"{\n")
    arguments = argparse.Namespace(
        files=[str(tmp_path / "a.jsonl")], tokenizer="bytes", output=str(tmp_path / "sub" / "out"), workers=None,
        field="text", on_error="skip", append_eod=True, backend="auto", shard=None, overwrite=False,
            chat=False, holdout=None,
    )  # fmt: skip
    assert command.run(arguments) == 0
    printed = capsys.readouterr().out
    assert "2 documents, 6 bytes of text -> 8 tokens" in printed
    assert "1 empty documents were left out" in printed
    assert "a.jsonl, line 4: invalid JSON" in printed
    assert printed.splitlines()[-1] == f"next: octant data inspect {tmp_path / 'sub' / 'out'}"
