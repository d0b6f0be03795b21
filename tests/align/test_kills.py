"""Killed for good while conversations are put in tokens, or while a reference is asked: nothing wrong is used again."""

from __future__ import annotations

import multiprocessing as mp
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corpus_tools.conversations.start import open_corpora, prepared
from engine.config import Config
from tests.align.test_comparisons import comparison_config, place  # noqa: F401     # a fixture
from tests.align.test_sft import chat_config, write_chats
from tests.kit.runs import metrics, train_here

CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.align.test_kills"])


def tokenize(config: Config, pipe: Any) -> None:
    pipe.send("begins")
    prepared(config, lambda line: None)


def ask_the_reference(config: Config, pipe: Any) -> None:
    open_corpora(config, say=lambda line: None)
    pipe.send("begins")
    train_here(config, stop_at=1)


def killed(life: Callable[..., None], config: Config, after: float) -> bool:
    """Whether the life had not ended by itself so many seconds after it began its work."""
    here, there = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=life, args=(config, there), daemon=True)
    process.start()
    there.close()
    assert here.poll(120) and here.recv() == "begins"
    process.join(after)
    process.kill()
    process.join(30)
    assert process.exitcode in (0, -9)
    return process.exitcode == -9


def test_tokens(tmp_path: Path) -> None:
    write_chats(tmp_path / "train.jsonl", 12_000)
    want = {Path(path).name: files_of(path) for path in prepared(chat_config(tmp_path, "whole"), print).values()}
    config, dice, kills = chat_config(tmp_path, "killed"), random.Random(0), 0
    for _ in range(6):
        kills += killed(tokenize, config, dice.random() * 0.5)
        for side_file in (tmp_path / "killed" / "data").glob("*.json"):
            assert files_of(side_file.with_suffix("")) == want[side_file.stem], "there, so it is whole"
    assert kills
    assert {Path(path).name: files_of(path) for path in prepared(config, print).values()} == want


def files_of(prefix: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(f"{prefix}").parent.glob(f"{Path(prefix).name}.*")
            if path.suffix != ".json" and "partial" not in path.name}


def test_references(place: Path) -> None:  # noqa: F811
    whole, parts = (comparison_config(place, name, "dpo", steps=2, checkpoint={
        "every": 0, "load": str(place / "base")}) for name in ("unharmed", "killed"))
    assert not killed(ask_the_reference, whole, 120)
    train_here(whole)
    dice, kills = random.Random(1), 0
    for _ in range(4):
        kills += killed(ask_the_reference, parts, dice.random() * 0.6)
    assert kills
    train_here(parts)
    assert [row["loss"] for row in metrics(parts)] == [row["loss"] for row in metrics(whole)]
    kept, want = ({path.name: path.read_bytes() for path in (Path(config.run.dir) / "reference").glob("*.bin")}
                  for config in (parts, whole))
    assert kept == want and kept
    assert metrics(whole)[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
