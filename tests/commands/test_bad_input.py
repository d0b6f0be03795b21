"""Every wrong request of `octant train` ends with one clear message and exit code 2: no traceback, nothing written.

And that before torch is imported or a process is started, where it can be known then.  What only the ranks can find out
is tested in tests/train/test_processes.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.data.indexed import IndexedWriter

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
run: {dir: run, device: cpu}
model: {num_layers: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, ffn_hidden_size: 64, vocab_size: 257,
        max_seq_len: 64}
precision: {compute: fp32}
data: {tokenizer: bytes, seq_len: 32, train: [{path: corpus}]}
batch: {micro: 1, global: 4}
steps: 2
"""
# Read by every interpreter as it starts: importing one of these fails, as if it were not installed.
WITHOUT = "import sys\nfor name in ('torch', 'tensorboard', 'wandb'):\n    sys.modules[name] = None\n"


def octant(folder: Path, *arguments: str, without: str = "") -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (without, str(ROOT))))
    return subprocess.run([sys.executable, "-m", "engine", *arguments], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": path}, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration that trains, and its corpus; beside it broken ones."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "good.yaml").write_text(CONFIG)
    (folder / "text.txt").write_text("some text that goes on and on, " * 60)
    done = octant(folder, "prepare", "text.txt", "--tokenizer", "bytes", "--output", "corpus")
    assert done.returncode == 0, done.stderr
    for name in ("truncated", "unindexed", "halved", "mislabelled"):
        for suffix in (".bin", ".idx", ".json"):
            (folder / (name + suffix)).write_bytes((folder / ("corpus" + suffix)).read_bytes())
    for name in ("truncated.bin", "halved.idx", "mislabelled.json"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:len(data) // 2])
    (folder / "unindexed.idx").write_bytes(b"")
    for name, tokens in {"foreign": np.arange(400), "short": np.arange(20)}.items():
        with IndexedWriter(folder / name, np.uint16) as writer:             # no side file tells what is in it
            writer.add_document(np.flip(tokens))
    np.zeros(3).tofile(folder / "not-a-checkpoint")
    (folder / "empty-run" / "checkpoints").mkdir(parents=True)
    (folder / "broken.yaml").write_text("run: {dir: run\nsteps: 2\n")
    (folder / "words.yaml").write_text("just some words\n")
    (folder / "empty.yaml").write_text("")
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    (folder / "circle.yaml").write_text("base: circle.yaml\n")
    (folder / "broken.model").write_bytes(b"no SentencePiece model")
    (folder / "without").mkdir()
    (folder / "without" / "sitecustomize.py").write_text(WITHOUT)
    return folder


@pytest.mark.parametrize(("overrides", "expected"), [
    (["optim.lrr=1"], "optim.lrr: unknown key; did you mean `lr`?"),
    (["optm.lr=1"], "optm: unknown key; did you mean `optim`?"),
    (["steps=soon"], "steps: must be a valid integer"),
    (["steps=0"], "steps: must be at least 1"),
    (["optim.lr=-1"], "optim.lr: must be greater than 0"),
    (["steps"], "override 'steps': expected key=value"),
    (["model.preset=llama-8b"], "model.preset 'llama-8b' does not exist; did you mean `llama3-8b`?"),
    (["parallel.tensor=2", "parallel.data=3"], "batch.global(4) is not batch.micro(1) × data(3)"),
    (["parallel.tensor=3"], "model.num_heads(4) is not divisible by parallel.tensor(3)"),
    (["parallel.tensor=6", "model.num_heads=12", "model.num_kv_heads=4"],
     "model.num_kv_heads(4) is not divisible by parallel.tensor(6)"),
    (["parallel.pipeline=3"], "model.num_layers(2) < pipeline(3)"),
    (["parallel.schedule=interleaved"], "needs parallel.virtual_stages ≥ 2"),
    (["parallel.tensor=3", "run.device=auto"], "is not divisible by parallel.tensor(3)"),
    (["data.seq_len=65"], "data.seq_len(65) > model.max_seq_len(64)"),
    (["data.train=[{path: nowhere}]"], "nowhere.idx: no such file"),
    (["data.valid=[{path: nowhere}]"], "nowhere.idx: no such file"),
    (["data.train=[{path: truncated}]"], "truncated.bin: "),
    (["data.train=[{path: unindexed}]"], "unindexed.idx: 0 bytes"),
    (["data.train=[{path: halved}]"], "halved.idx: "),
    (["data.train=[{path: mislabelled}]"], "mislabelled.json cannot be read as the side file of a corpus"),
    (["data.train=[{path: short}]", "data.tokenizer=null"], "20 tokens, fewer than the 33 of one sample"),
    (["data.train=[]"], "data.train"),
    (["data.train=[{path: corpus, max_epochs: 1}]", "steps=100"], "100 steps of 4 sequences need 400 samples"),
    (["data.tokenizer=missing.model"], "tokenizer missing.model does not exist"),
    (["data.tokenizer=broken.model"], "broken.model"),
    (["model.vocab_size=100"], "257 ids"),
    (["model.vocab_size=100", "data.tokenizer=null"], "tokenizer bytes has 257 ids, the model's vocabulary"),
    (["data.train=[{path: foreign}]", "data.tokenizer=null"], "foreign.bin: token 0 is 399, outside the model's"),
    (["checkpoint.resume=nowhere"], "nowhere: no checkpoint there"),
    (["checkpoint.resume=not-a-checkpoint"], "not-a-checkpoint: no checkpoint there"),
    (["checkpoint.resume=empty-run"], "empty-run: no checkpoint there"),
    (["checkpoint.load=nowhere"], "nowhere: no checkpoint there"),
    (["checkpoint.load=nowhere/step-00000100"], "nowhere/step-00000100: no checkpoint there"),
    (["log.tensorboard=true"], "pip install 'octant[viz]'"),
    (["log.wandb=project"], "pip install 'octant[viz]'"),
    (["run.objective=ppo"], "run.objective"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_one_message_and_exit_code_2(folder: Path, overrides: list[str], expected: str) -> None:
    done = octant(folder, "train", "good.yaml", *overrides, without="without")
    assert_refused(done, expected)
    assert not (folder / "run").exists()


@pytest.mark.parametrize(("name", "expected"), [
    ("broken.yaml", "broken.yaml is not valid YAML"), ("words.yaml", "a configuration is a mapping of sections"),
    ("empty.yaml", "model: is missing"), ("binary.yaml", "cannot read the configuration binary.yaml"),
    ("nowhere.yaml", "cannot read the configuration nowhere.yaml"), (".", "cannot read the configuration ."),
    ("circle.yaml", "goes round in a circle"),
])
def test_files_that_are_no_configuration(folder: Path, name: str, expected: str) -> None:
    assert_refused(octant(folder, "train", name, without="without"), expected)


def test_no_configuration_at_all(folder: Path) -> None:
    done = octant(folder, "train", without="without")
    assert done.returncode == 2
    assert "octant train: error: the following arguments are required: CONFIG.yaml" in done.stderr.splitlines()[-1]


def assert_refused(done: subprocess.CompletedProcess[str], expected: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert expected in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("octant train: ") and len(re.findall("^octant ", done.stderr, re.MULTILINE)) == 1
    assert done.stdout == ""


def test_a_corpus_of_another_tokenizer(folder: Path) -> None:
    made = octant(folder, "tokenizer", "train", "text.txt", "--vocab-size", "280", "--output", "small.model")
    assert made.returncode == 0, made.stderr
    done = octant(folder, "train", "good.yaml", "data.tokenizer=small.model", "model.vocab_size=300",
                  without="without")
    assert_refused(done, "corpus.json: the corpus was made with another tokenizer than the run's: bytes (")


def test_the_configuration_itself_is_good(folder: Path) -> None:
    done = octant(folder, "train", "good.yaml", "run.dir=fine")
    assert done.returncode == 0, done.stderr
