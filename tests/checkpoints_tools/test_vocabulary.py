"""A model with a larger vocabulary: old logits as they were, new rows means, and training goes on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from checkpoints_tools.names import PREFIX
from corpus_tools.tokenizers.extend import extend_tokenizer
from corpus_tools.tokenizers.training import train_tokenizer
from engine import cli
from engine.checkpoint.read import CheckpointReader
from engine.data.tokenizer import load_tokenizer
from engine.model.context import Batch
from engine.model.transformer import Transformer
from tests.kit.checkpoints import model, write_random
from tests.kit.texts import chinese_texts, english_texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`en.model`, `zh.model`, and `merged.model` of both."""
    folder = tmp_path_factory.mktemp("vocabulary")
    train_tokenizer(english_texts(20), 600, folder / "en")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in chinese_texts(100) for line in text.split("\n")),
        model_prefix=str(folder / "zh"), vocab_size=200, hard_vocab_limit=False, minloglevel=2)
    extend_tokenizer(folder / "en.model", folder / "zh.model", folder / "merged.model")
    return folder


def checkpoint(folder: Path, path: Path, tokenizer: str = "en.model", **changes: Any) -> CheckpointReader:
    loaded = load_tokenizer(folder / tokenizer)
    config = model(**{"vocab_size": loaded.vocab_size} | changes)
    return write_random(path, config, str(folder / tokenizer), data=loaded.info.fingerprint())


def transformer(reader: CheckpointReader) -> Transformer:
    config = model(**reader.metadata["config"]["model"])
    built = Transformer(config)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(reader.read(PREFIX + parameter.spec.name))
    return built


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"vocab_size": 640}], ids=["untied", "tied", "wide"])
def test_old_text_has_the_logits_it_had(folder: Path, tmp_path: Path, changes: dict[str, Any],
                                        capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the model has rows that its tokenizer gives no ids for: these go."""
    before = checkpoint(folder, tmp_path / "model", **changes)
    out, merged = tmp_path / "out", load_tokenizer(folder / "merged.model")
    assert cli.run(["convert", "extend-vocab", str(before.path), str(out), "--tokenizer",
                    str(folder / "merged.model")]) == 0
    old_tokenizer, after = load_tokenizer(folder / "en.model"), CheckpointReader(out)
    size = old_tokenizer.vocab_size
    assert f"{merged.vocab_size - size:,} new rows, {merged.vocab_size:,} in all" in capsys.readouterr().out
    assert after.metadata["config"]["model"]["vocab_size"] == merged.vocab_size
    ids = torch.tensor(old_tokenizer.encode("The quick brown fox jumps over the lazy dog."))
    batch = Batch(ids.unsqueeze(1), torch.arange(len(ids)).unsqueeze(1), None, None)
    old, new = (transformer(reader)(batch.tokens_SB, batch) for reader in (before, after))
    torch.testing.assert_close(new[..., :size], old[..., :size], rtol=1e-6, atol=1e-6)
    for name in ("embedding.weight", *(["output_layer.weight"] if not changes.get("tie_embeddings") else [])):
        table, larger = before.read(PREFIX + name), after.read(PREFIX + name)
        assert torch.equal(larger[:size], table[:size]) and larger.shape[0] == merged.vocab_size
        number = next(i for i in range(size, merged.vocab_size) if merged.decode([i]) == "的")
        pieces = old_tokenizer.encode("的")[1:]                            # without the ▁ in front
        torch.testing.assert_close(larger[number], table[pieces].mean(0))


def test_a_run_goes_on_from_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what loads the old model with the new tokenizer is told how to."""
    corpus, texts = tmp_path / "zh", tmp_path / "zh.txt"
    texts.write_text("\n".join(chinese_texts(10)))
    assert cli.run(["prepare", str(texts), "--tokenizer", str(folder / "merged.model"), "--output", str(corpus),
                    "--workers", "1"]) == 0
    before = checkpoint(folder, tmp_path / "model")
    assert cli.run(["convert", "extend-vocab", str(before.path), str(tmp_path / "out"), "--tokenizer",
                    str(folder / "merged.model")]) == 0
    shape = {key: before.metadata["config"]["model"][key] for key in (
        "num_layers", "hidden_size", "num_heads", "head_dim", "ffn_hidden_size", "max_seq_len")}
    config = tmp_path / "run.yaml"
    config.write_text(f"run: {{dir: {tmp_path / 'run'}, device: cpu}}\nmodel: {shape}\nprecision: {{compute: fp32}}\n"
                      f"data: {{tokenizer: {folder / 'merged.model'}, seq_len: 32, train: [{{path: {corpus}}}]}}\n"
                      "steps: 2\neval: {every: 0}\n")
    capsys.readouterr()
    assert cli.run(["train", str(config), f"checkpoint.load={before.path}"]) == 2
    assert "octant convert extend-vocab" in capsys.readouterr().err
    assert cli.run(["train", str(config), f"checkpoint.load={tmp_path / 'out'}"]) == 0


@pytest.mark.parametrize(("tokenizer", "own", "message"), [
    ("en.model", "en.model", "nothing was appended"), ("merged.model", "zh.model", "does not begin with the pieces"),
    ("bytes", "en.model", "no SentencePiece .model"),
    ("merged.model", "gone.model", "--from-tokenizer PATH says where")])
def test_other_tokenizers_are_refused(folder: Path, tmp_path: Path, tokenizer: str, own: str, message: str,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    reader = checkpoint(folder, tmp_path / "model", "en.model" if own == "gone.model" else own)
    spec = tokenizer if tokenizer == "bytes" else str(folder / tokenizer)
    more = ["--from-tokenizer", str(folder / own)] if own == "gone.model" else []
    out = tmp_path / "out"
    assert cli.run(["convert", "extend-vocab", str(reader.path), str(out), "--tokenizer", spec, *more]) == 2
    assert message in capsys.readouterr().err and not out.exists()
