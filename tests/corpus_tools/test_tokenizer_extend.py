"""Vocabulary expansion: the union of pieces, old ids and English untouched, new rows the mean of what they replace."""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from corpus_tools.tokenizers.extend import HAN, ExpansionPlan, expanded_rows, extend_tokenizer
from corpus_tools.tokenizers.training import train_tokenizer
from corpus_tools.tokenizers.verify import verify_tokenizer
from engine.commands import tokenizer as command
from engine.data.sentencepiece_model import parse_model, read_model
from engine.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from engine.errors import RequestError
from tests.kit.texts import chinese_texts, english_texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`en.model`, trained on English only, and `zh.model`, trained on Chinese (unigram, as published ones are)."""
    folder = tmp_path_factory.mktemp("extend")
    train_tokenizer(english_texts(), 1200, folder / "en")
    lines = [line for text in chinese_texts(200) for line in text.split("\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "zh"), vocab_size=260, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    return folder


def _load(path: Path) -> SentencePieceTokenizer:
    tokenizer = load_tokenizer(path)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return tokenizer


@pytest.mark.parametrize("only", ["han", "all"])
def test_union_of_pieces(folder: Path, only: str) -> None:
    output = folder / f"{only}.model"
    plan = extend_tokenizer(folder / "en.model", folder / "zh.model", output, only=only, overwrite=True)
    old, other, merged = (read_model(folder / f"{name}.model") for name in ("en", "zh", only))
    old_texts = [piece.text for piece in old.pieces]
    wanted = {piece.text for piece in other.pieces if piece.type == 1 and (only == "all" or HAN.search(piece.text))}
    assert len(merged.pieces) == len(set(old_texts) | wanted) == plan.vocab_size
    assert merged.pieces[: len(old.pieces)] == old.pieces, "old ids, scores and kinds are as they were"
    assert {piece.text for piece in merged.pieces[len(old.pieces) :]} == wanted - set(old_texts)
    scores = [piece.score for piece in merged.pieces[len(old.pieces) :]]
    assert min(piece.score for piece in old.pieces) > scores[0]
    assert all(a > b for a, b in pairwise(scores)), "strictly decreasing"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{only}.model"))
    assert processor.vocab_size() == plan.vocab_size


def test_english_is_cut_as_before_and_chinese_shorter(folder: Path) -> None:
    extend_tokenizer(folder / "en.model", folder / "zh.model", folder / "han.model", overwrite=True)
    old, new = _load(folder / "en.model"), _load(folder / "han.model")
    lines = [line for text in english_texts() for line in text.split("\n") if not HAN.search(line)]
    assert len(lines) > 10_000
    assert sum(old.encode(line) != new.encode(line) for line in lines) == 0
    chinese = "\n".join(chinese_texts(20, seed=5))
    assert len(new.encode(chinese)) < 0.5 * len(old.encode(chinese))
    assert new.decode(new.encode(chinese)) == chinese


@pytest.mark.parametrize("only", ["han", "all"])
def test_verify_the_extended_model(folder: Path, only: str) -> None:
    extend_tokenizer(folder / "en.model", folder / "zh.model", folder / f"{only}.model", only=only, overwrite=True)
    report = verify_tokenizer(_load(folder / f"{only}.model"), [*english_texts(3), *chinese_texts(20)])
    assert report.differences == 0, report.text()


def test_rows_are_means_of_the_pieces_replaced(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    plan = extend_tokenizer(folder / "en.model", folder / "zh.model", folder / "han.model", overwrite=True)
    old = _load(folder / "en.model")
    by_piece = {row.piece: row for row in plan.rows}
    assert [old.model.pieces[i].text for i in by_piece["的"].replaces] == ["<0xE7>", "<0x9A>", "<0x84>"]
    for row in plan.rows:
        assert old.decode(row.replaces).strip() == row.piece.strip("▁")
    weight = np.random.default_rng(0).normal(size=(old.vocab_size + 5, 8)).astype(np.float32)  # 5 rows of padding
    expanded = expanded_rows(weight, plan.old_vocab_size, plan.rows)
    assert expanded.shape == (plan.vocab_size, 8)
    assert np.array_equal(expanded[: old.vocab_size], weight[: old.vocab_size])
    for row in plan.rows:
        assert np.allclose(expanded[row.id], weight[row.replaces].mean(0), atol=1e-6)
    as_torch = expanded_rows(torch.from_numpy(weight), plan.old_vocab_size, plan.rows)
    assert np.allclose(as_torch.numpy(), expanded, atol=1e-6)
    with pytest.raises(RequestError, match="rows cannot hold"):
        expanded_rows(weight[:100], plan.old_vocab_size, plan.rows)


def test_unreachable_pieces_are_named(folder: Path) -> None:
    """No text is cut into them, and each of the others is what some text is cut into when it stands alone."""
    plan = extend_tokenizer(folder / "en.model", folder / "zh.model", folder / "han.model", overwrite=True)
    new = _load(folder / "han.model")
    texts = {row.id: row.piece for row in plan.rows}
    produced = {i for text in [*chinese_texts(200), *texts.values()] for i in new.encode(text)}
    assert plan.unreachable and not produced & set(plan.unreachable)
    known = {piece.text for piece in new.model.pieces} - {texts[i] for i in plan.unreachable}
    for token_id in plan.unreachable:
        text = texts[token_id]
        assert not any(text[:cut] in known and text[cut:] in known for cut in range(1, len(text)))
    assert len(produced & set(texts)) > 0.9 * (len(texts) - len(plan.unreachable))


def test_command_writes_model_and_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = argparse.Namespace(
        action="extend", model=str(folder / "en.model"), with_model=str(folder / "zh.model"), only="han",
        output=str(folder / "by_command.model"), overwrite=False,
    )  # fmt: skip
    assert command.run(arguments) == 0
    plan = ExpansionPlan.from_json(json.loads((folder / "by_command.plan.json").read_text(encoding="utf-8")))
    assert plan.sha256 == _load(folder / "by_command.model").sha256
    assert plan.base_sha256 == _load(folder / "en.model").sha256
    assert f"= {plan.vocab_size:,} pieces" in capsys.readouterr().out


def test_a_base_that_is_not_bpe_is_refused(folder: Path) -> None:
    with pytest.raises(RequestError, match="not a BPE model"):
        extend_tokenizer(folder / "zh.model", folder / "en.model", folder / "no.model", overwrite=True)


def test_the_model_file_stays_one_message_per_section(folder: Path) -> None:
    """Readers that don't merge repeated sections, as protobuf does, must see the whole trainer section."""
    extend_tokenizer(folder / "en.model", folder / "zh.model", folder / "han.model", overwrite=True)
    old, new = (parse_model((folder / f"{name}.model").read_bytes()) for name in ("en", "han"))
    assert (new.model_type, new.byte_fallback, new.charsmap) == (old.model_type, old.byte_fallback, old.charsmap)
