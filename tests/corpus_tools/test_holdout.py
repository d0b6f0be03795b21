"""What is held out: by content, whatever reads it, and never on both sides."""

from __future__ import annotations

from pathlib import Path

import pytest

from corpus_tools import readers
from corpus_tools.holdout import Holdout
from corpus_tools.prepare import prepare
from corpus_tools.shards import merge_corpora
from engine import cli
from engine.errors import DataError, RequestError
from tests.kit.corpora import corpus_bytes, documents_of, write_documents
from tests.kit.texts import english_texts

TEXTS = [f"{number} {text}" for number, text in enumerate(english_texts(60))]
TWICE = [*TEXTS, *TEXTS[:20]]


@pytest.mark.parametrize("amount", ["0.2", "15"])
def test_no_document_in_both_and_all_in_one(amount: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write_documents(tmp_path / "a.jsonl", TWICE), tmp_path / "out"
    assert cli.run(["prepare", str(file), "--tokenizer", "bytes", "--output", str(out), "--holdout", amount]) == 0
    kept, held = ([tuple(d) for d in documents_of(p)] for p in (out, tmp_path / "out-valid"))
    assert f"{len(held)} of the documents are held out, in {out}-valid" in capsys.readouterr().out
    prepare([file], "bytes", tmp_path / "all", workers=1)
    whole = [tuple(d) for d in documents_of(tmp_path / "all")]
    assert not set(kept) & set(held) and sorted(kept + held) == sorted(whole)
    assert [d for d in whole if d in set(held)] == held                                  # in the order of the corpus
    assert 15 <= len(held) <= 15 + 15 if amount == "15" else 5 < len(held) < 30
    before = [corpus_bytes(p) for p in (out, tmp_path / "out-valid")]
    assert cli.run(["prepare", str(file), "--tokenizer", "bytes", "--output", str(out), "--holdout", amount]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert [corpus_bytes(p) for p in (out, tmp_path / "out-valid")] == before


def test_the_same_split_for_any_workers_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1500)
    monkeypatch.setattr("corpus_tools.prepare.BYTES_PER_WORKER", 1)
    files = [write_documents(tmp_path / f"{n}.jsonl", TWICE[40 * n : 40 * n + 40]) for n in range(2)]
    split = Holdout.of("0.3")
    for workers in (1, 2):
        prepare(files, "bytes", tmp_path / f"w{workers}", workers=workers, holdout=split, part_seconds=0)
    for index in range(2):
        prepare(files, "bytes", tmp_path / "s", workers=1, holdout=split, shard=(index, 2))
    for end in ("", "-valid"):
        merge_corpora([tmp_path / f"s{end}-{n:05d}-of-00002" for n in range(2)], tmp_path / f"merged{end}")
        assert documents_of(tmp_path / f"w1{end}") == documents_of(tmp_path / f"w2{end}") \
            == documents_of(tmp_path / f"merged{end}")


def test_what_cannot_be_held_out(tmp_path: Path) -> None:
    for text in ("0", "-1", "1.5", "some", "nan", "inf"):
        with pytest.raises(RequestError, match="write a share"):
            Holdout.of(text)
    file = write_documents(tmp_path / "a.jsonl", TEXTS[:5])
    with pytest.raises(DataError, match="holds out 5 of 5 documents"):
        prepare([file], "bytes", tmp_path / "out", workers=1, holdout=Holdout.of("5"))
    with pytest.raises(RequestError, match="give a share"):
        prepare([file], "bytes", tmp_path / "out", workers=1, holdout=Holdout.of("5"), shard=(0, 1))
    assert not list(tmp_path.glob("*.bin"))
