"""What a command names as the next one runs as it is printed, and so does what that one names, until nothing is new."""

from __future__ import annotations

import json
import re
import shlex
from collections import deque
from pathlib import Path

import pytest

from engine import cli
from engine.hints import hint

ROOT = Path(__file__).resolve().parents[2]
LINE = re.compile(r"next: octant (.*)$", re.MULTILINE)
CONFIG = """
run: {dir: "runs/a run", device: cpu}
model: {num_layers: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, ffn_hidden_size: 64, max_seq_len: 64}
parallel: {data: 1}
precision: {compute: fp32}
data: {tokenizer: bytes, seq_len: 32, train: [{path: data/tiny}], valid: [{path: data/tiny}]}
batch: {micro: 1, global: 2}
steps: 1
eval: {every: 0}
"""
FIRST = (                                                    # what they name is reached from here; in this order
    "data example 'my corpus.jsonl' --bytes 60000",
    "tokenizer train 'my corpus.jsonl' --vocab-size 500 --output tok.model",
    "tokenizer verify 'my corpus.jsonl' --tokenizer tok.model",
    "tokenizer train 'my corpus.jsonl' --vocab-size 450 --output other.model",
    "tokenizer extend tok.model --with other.model --only all --output merged.model",
    "tokenizer verify example.jsonl --tokenizer merged.model",
    "prepare 'my corpus.jsonl' --tokenizer bytes --output data/whole --shard 0/1",
    "data clean 'my corpus.jsonl' --output clean --workers 1",
    "data merge data/tiny data/tiny-copy --output data/both",
    "data inspect run.yaml batch.global=4",
    "train run.yaml",
    "eval 'runs/a run' --data data/tiny",
    "checkpoint list 'runs/a run'",
    "checkpoint reshard 'runs/a run' resharded --files 2",
    "plan run.yaml --gpus 2 parallel.pipeline=2 parallel.data=auto",
    "schedule gpipe --stages 2 --microbatches 3",
    "presets",
)


def named(printed: str) -> list[list[str]]:
    """Every command that the text names, without the comment behind it."""
    return [shlex.split(line, comments=True) for line in LINE.findall(printed)]


def test_every_hint_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(CONFIG)
    done: list[list[str]] = []
    hinted = 0
    for first in FIRST:
        if first.startswith("data merge"):
            for suffix in (".bin", ".idx", ".json"):
                Path(f"data/tiny-copy{suffix}").write_bytes(Path(f"data/tiny{suffix}").read_bytes())
        todo = deque([shlex.split(first)])
        while todo:
            words = todo.popleft()
            if words in done:
                continue
            done.append(words)
            assert cli.run(words) == 0, (words, capfd.readouterr())
            following = named("\n".join(capfd.readouterr()))
            hinted += len(following)
            todo += following
    assert hinted > 25 and {words[0] for words in done} >= {"prepare", "data", "train", "generate", "report", "plan"}


def test_words_are_quoted() -> None:
    assert hint("data", "inspect", "a b", "--document", 0, why="reads 'it'") \
        == "next: octant data inspect 'a b' --document 0   # reads 'it'"
    assert named(hint("generate", "x", "--prompt", "it's", why="so")) == [["generate", "x", "--prompt", "it's"]]


def test_nobody_writes_hints_by_hand() -> None:
    folders = ("engine", "corpus_tools", "checkpoints_tools")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    by_hand = [str(path) for path in sources if "next: octant" in path.read_text(encoding="utf-8")]
    assert by_hand == [str(ROOT / "engine" / "hints.py")]


def test_json_output_is_json_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["schedule", "1f1b", "--stages", "2", "--microbatches", "2", "--json"]) == 0
    assert "makespan" in json.loads(capsys.readouterr().out)
