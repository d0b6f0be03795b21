"""Every shipped configuration trains: its own settings, on a model and a layout small enough for this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import load_config, resolve_layout
from tests.kit.runs import metrics, saved_steps, train, write_corpus

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["model.num_layers=4", "model.hidden_size=64", "model.num_heads=4", "model.num_kv_heads=2", "model.head_dim=16",
         "model.ffn_hidden_size=128", "model.vocab_size=257", "model.max_seq_len=128", "data.seq_len=64",
         "data.tokenizer=bytes", "batch.global=8", "batch.micro=1", "run.device=cpu", "steps=2", "eval.every=2",
         "eval.batches=1"]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configuration_trains(path: Path, tmp_path: Path) -> None:
    """Every axis that it cuts is cut in two."""
    asked = load_config(path).parallel
    degrees = {axis: min(2, getattr(asked, axis)) for axis in ("tensor", "context", "pipeline")}
    degrees["data"] = 2 if asked.data == "auto" else min(2, asked.data_size)
    corpus = write_corpus(tmp_path / "corpus")
    config = load_config(path, [*SMALL, f"run.dir={tmp_path}/run", f"data.train=[{{path: {corpus}}}]",
                                f"data.valid=[{{path: {corpus}}}]",
                                *(f"parallel.{axis}={degree}" for axis, degree in degrees.items())])
    config = resolve_layout(config, config.parallel.world_size)
    train(config)
    first, second = metrics(config)
    assert 5 < first["loss"] < 6                                       # ln 257 = 5.55: it knows nothing yet
    assert 0 < second["grad_norm"] < 10 and second["skipped"] == 0
    assert abs(second["valid_loss"] - second["loss"]) < 0.5
    assert saved_steps(config) == [2]
