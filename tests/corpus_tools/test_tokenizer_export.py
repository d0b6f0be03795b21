"""The exported Hugging Face folder, gigatoken and SentencePiece give the ids we give; `verify` notices where not."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece

from corpus_tools.tokenizers import fast_backend
from corpus_tools.tokenizers.export import export_hf_tokenizer
from corpus_tools.tokenizers.training import train_tokenizer
from corpus_tools.tokenizers.verify import verify_tokenizer
from engine.commands import tokenizer as command
from engine.data.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from engine.errors import DataError
from tests.data.test_tokenizer import ODD_TEXTS, hf_folder, model, tiktoken_file
from tests.kit.texts import chinese_texts, english_texts

__all__ = ["hf_folder", "model", "tiktoken_file"]  # fixtures

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("spec", ["bytes", "model", "tiktoken_file"])
def test_export_gives_the_same_ids(spec: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(spec if spec == "bytes" else request.getfixturevalue(spec))
    export_hf_tokenizer(tokenizer, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert 1 + max(exported.get_vocab().values()) == tokenizer.vocab_size
    assert exported.eos_token_id == tokenizer.eod_id
    assert exported.bos_token_id == tokenizer.bos_id
    texts = [*ODD_TEXTS, *english_texts(6), *chinese_texts(10)]
    for text in [*texts, *(line for whole in texts for line in whole.split("\n"))]:
        ids = tokenizer.encode(text)
        assert exported(text)["input_ids"] == ids, text[:60]
        assert exported.decode(ids) == tokenizer.decode(ids)


def test_export_beside_a_llama_config(model: Path, tmp_path: Path) -> None:
    """`AutoTokenizer` must take the class named in tokenizer_config.json, not the one config.json suggests."""
    tokenizer = load_tokenizer(model)
    transformers.LlamaConfig(vocab_size=tokenizer.vocab_size).save_pretrained(tmp_path)
    export_hf_tokenizer(tokenizer, tmp_path)
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "  def f(x):\n\treturn x  # 世界 </s>"
    assert exported(text)["input_ids"] == tokenizer.encode(text)


def test_special_texts_can_be_asked_for(model: Path, tmp_path: Path) -> None:
    export_hf_tokenizer(load_tokenizer(model), tmp_path)
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=False)
    assert exported("a</s>")["input_ids"][-1] == 2


def test_hugging_face_folders_are_copied(hf_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(hf_folder)
    export_hf_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).sha256 == tokenizer.sha256
    assert load_tokenizer(tmp_path).eod_id == tokenizer.eod_id


def test_a_model_without_counterpart_is_refused(tmp_path: Path) -> None:
    sentences = [line for text in english_texts(6) for line in text.split("\n") if line][:3000]
    options = {"unigram": {"model_type": "unigram"}, "user": {"model_type": "bpe", "user_defined_symbols": ["<sep>"]},
               "suffix": {"model_type": "bpe", "treat_whitespace_as_suffix": True}}  # fmt: skip
    reasons = {"unigram": "not a BPE model", "user": "user-defined symbols", "suffix": "spaces behind words"}
    for name, option in options.items():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_prefix=str(tmp_path / name), vocab_size=400, minloglevel=2,
            **option,
        )  # fmt: skip
        with pytest.raises(DataError, match=reasons[name]):
            export_hf_tokenizer(load_tokenizer(tmp_path / f"{name}.model"), tmp_path / "out")


@pytest.mark.parametrize("rule", ["nmt_nfkc", "identity"])
def test_export_of_normalising_models(rule: str, tmp_path: Path) -> None:
    """SentencePiece's own defaults: NFKC, and runs of spaces made one."""
    sentences = [line for text in english_texts(6) for line in text.split("\n") if line][:3000]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(tmp_path / "n"), vocab_size=700, model_type="bpe",
        normalization_rule_name=rule, byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    report = verify_tokenizer(load_tokenizer(tmp_path / "n.model"), [*english_texts(3), "ﬁne  ½ spaces  ", "汉字。"])
    assert report.differences == 0, report.text()


def test_verify_finds_no_difference(model: Path) -> None:
    report = verify_tokenizer(load_tokenizer(model), [*ODD_TEXTS, *english_texts(12), *chinese_texts(5)])
    assert report.num_texts > 1000
    assert {"SentencePiece", "exported Hugging Face tokenizer"} <= set(report.num_different)
    assert report.differences == 0, report.text()


def test_verify_notices_one_wrong_id(model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A reference that merges one pair less must be reported, with the place, and give exit code 1."""
    (tmp_path / "corpus.txt").write_text("\n".join(english_texts(1)), encoding="utf-8")
    (tmp_path / "zh.jsonl").write_text(json.dumps({"body": chinese_texts(1)[0]}) + "\n")
    arguments = argparse.Namespace(
        action="verify", tokenizer=str(model), files=[str(tmp_path / "corpus.txt")], field="text"
    )
    assert command.run(arguments) == 0
    assert "ours = SentencePiece: 0 differences" in capsys.readouterr().out

    tokenizer = load_tokenizer(model)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    honest = tokenizer.processor.encode
    tokenizer.processor = SimpleNamespace(encode=lambda text: honest(text)[:-1], decode=tokenizer.processor.decode)
    tokenizer._words = None  # ours now ask the same processor; the export is the one that is right
    report = verify_tokenizer(tokenizer, ["some text"])
    assert report.num_different["exported Hugging Face tokenizer"] == 1
    assert report.differences == 1
    assert "near" in report.text()


class _Pretend(Tokenizer):
    """A reference whose text `</s>` is special and whose ids are code points."""

    kind, name, sha256, vocab_size, bos_id, eod_id, pad_id = "bytes", "pretend", "0" * 64, 1 << 21, None, 2, None
    special_texts = ("</s>",)

    def encode_array(self, text: str, *, continues: bool = False) -> np.ndarray:
        return np.array([ord(c) for c in text], np.int32)

    def decode(self, ids: object) -> str:
        raise NotImplementedError


def _code_points(text: str) -> np.ndarray:
    return np.array([ord(c) for c in text], np.uint32)


@pytest.mark.parametrize(
    ("encode", "used"),
    [
        (_code_points, True),
        (lambda text: _code_points(text.replace("</s>", "\2")), True),  # special texts go to the reference
        (lambda text: _code_points(text.strip()), False),
        (lambda text: _code_points(text)[:64], False),
    ],
)
def test_a_faster_backend_is_used_only_if_it_agrees(
    encode: Callable[[str], np.ndarray], used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_backend, "_gigatoken", lambda _: encode)
    tokenizer = fast_backend.accelerated(_Pretend())
    assert isinstance(tokenizer, fast_backend.FastTokenizer) == used
    assert tokenizer.encode("a</s>b") == _Pretend().encode("a</s>b")


def test_a_faster_backend_is_checked_on_the_corpus() -> None:
    wrong_on_q = fast_backend.FastTokenizer(_Pretend(), lambda text: _code_points(text.replace("q", "k")))
    wrong_on_q.check("fine")
    with pytest.raises(DataError, match="disagree on the text starting 'quite'"):
        wrong_on_q.check("quite")


def test_gigatoken_gives_the_same_ids(model: Path, hf_folder: Path) -> None:
    pytest.importorskip("gigatoken")
    for spec in (model, hf_folder):
        reference = load_tokenizer(spec)
        fast = fast_backend.accelerated(reference)
        assert isinstance(fast, fast_backend.FastTokenizer)
        for text in [*ODD_TEXTS, *english_texts(10), *chinese_texts(10)]:
            assert fast.encode(text) == reference.encode(text), text[:60]


def test_train_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("\n".join(english_texts(3)), encoding="utf-8")
    arguments = argparse.Namespace(
        action="train", files=[str(tmp_path / "a.txt")], field="text", vocab_size=500,
        output=str(tmp_path / "t.model"), overwrite=False
    )  # fmt: skip
    assert command.run(arguments) == 0
    assert load_tokenizer(tmp_path / "t.model").vocab_size == 500
    assert capsys.readouterr().out.splitlines()[-1].startswith("next: octant prepare")
    assert train_tokenizer(english_texts(3), 500, tmp_path / "again").exists()
