"""Every wrong request of `octant train` ends with one clear message and exit code 2, before any process is started."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
run: {dir: run, device: cpu}
model: {num_layers: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, ffn_hidden_size: 64, vocab_size: 257,
        max_seq_len: 64}
precision: {compute: fp32}
data: {tokenizer: bytes, seq_len: 32, train: [{path: corpus}]}
batch: {micro: 1, global: 4}
steps: 2
"""


def octant(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "engine", *arguments], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration that trains, and its corpus; beside it broken ones."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "good.yaml").write_text(CONFIG)
    (folder / "text.txt").write_text("some text that goes on and on, " * 60)
    done = octant(folder, "prepare", "text.txt", "--tokenizer", "bytes", "--output", "corpus")
    assert done.returncode == 0, done.stderr
    for name in ("truncated", "unindexed"):
        for suffix in (".bin", ".idx", ".json"):
            (folder / (name + suffix)).write_bytes((folder / ("corpus" + suffix)).read_bytes())
    data = (folder / "truncated.bin").read_bytes()
    (folder / "truncated.bin").write_bytes(data[:len(data) // 2])
    (folder / "unindexed.idx").write_bytes(b"")
    np.zeros(3).tofile(folder / "not-a-checkpoint")
    return folder


@pytest.mark.parametrize(("overrides", "expected"), [
    (["optim.lrr=1"], "optim.lrr: unknown key; did you mean `lr`?"),
    (["parallel.tensor=2", "parallel.data=3"], "batch.global(4) is not batch.micro(1) × data(3)"),
    (["parallel.tensor=3"], "model.num_heads(4) is not divisible by parallel.tensor(3)"),
    (["parallel.tensor=4"], "model.num_kv_heads(2) is not divisible by parallel.tensor(4)"),
    (["parallel.pipeline=3"], "model.num_layers(2) < pipeline(3)"),
    (["data.seq_len=65"], "data.seq_len(65) > model.max_seq_len(64)"),
    (["data.train=[{path: nowhere}]"], "nowhere"),
    (["data.train=[{path: truncated}]"], "truncated"),
    (["data.train=[{path: unindexed}]"], "unindexed"),
    (["data.train=[]"], "data.train"),
    (["data.tokenizer=missing.model"], "missing.model"),
    (["model.vocab_size=100"], "vocab"),
    (["checkpoint.resume=nowhere"], "nowhere"),
    (["checkpoint.resume=not-a-checkpoint"], "not-a-checkpoint"),
    (["checkpoint.load=nowhere"], "nowhere"),
    (["run.objective=ppo"], "run.objective"),
], ids=lambda value: value[-1] if isinstance(value, list) else "")
def test_one_message_and_exit_code_2(folder: Path, overrides: list[str], expected: str) -> None:
    done = octant(folder, "train", "good.yaml", *overrides)
    assert done.returncode == 2, done.stdout + done.stderr
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert len(re.findall("^octant train: ", done.stderr, re.MULTILINE)) == 1
    assert not (folder / "run" / "checkpoints").exists()


def test_the_configuration_itself_is_good(folder: Path) -> None:
    done = octant(folder, "train", "good.yaml", "run.dir=fine")
    assert done.returncode == 0, done.stderr
