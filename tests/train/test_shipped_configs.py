"""Every shipped configuration trains: its own settings, on a model and a layout small enough for this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.config import load_config

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["model.num_layers=4", "model.hidden_size=64", "model.num_heads=4", "model.num_kv_heads=2", "model.head_dim=16",
         "model.ffn_hidden_size=128", "model.vocab_size=257", "model.max_seq_len=128", "data.seq_len=64",
         "data.tokenizer=bytes", "data.train=[{path: corpus}]", "data.valid=[{path: corpus}]", "batch.global=4",
         "batch.micro=1", "parallel.data=1", "run.dir=run", "run.device=cpu", "steps=2", "eval.every=2",
         "eval.batches=1"]


def octant(folder: Path, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "engine", *arguments], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configuration_trains(path: Path, tmp_path: Path) -> None:
    parallel = load_config(path).parallel
    (tmp_path / "text.txt").write_text("some text that goes on and on, " * 60)
    octant(tmp_path, "prepare", "text.txt", "--tokenizer", "bytes", "--output", "corpus")
    octant(tmp_path, "train", str(path), *SMALL, f"parallel.tensor={min(2, parallel.tensor)}",
           f"parallel.pipeline={min(2, parallel.pipeline)}")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    assert len(losses) == 2 and all(4 < loss < 7 for loss in losses)
