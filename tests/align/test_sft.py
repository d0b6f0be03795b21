"""Supervised fine-tuning: packed is unpacked, every layout is one process, and the whole run end to end."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from corpus_tools.conversations.start import open_corpora, prepared
from engine.align.sft import Supervised, SupervisedWithPretraining
from engine.config import Config, SourceConfig
from engine.data.chat.rows import ConversationSource, Fit
from engine.data.sample import Sample
from engine.model.context import Batch
from engine.model.fields import PTX
from engine.model.parameters import initialise, spec_of
from engine.model.transformer import Transformer
from engine.train.batches import collate
from tests.kit.distributed import run_distributed
from tests.kit.layouts import check, reference, run_layout, tiny_config, train_layout
from tests.kit.reference import Task

SEQ_LEN, ROWS = 64, 8
MODEL = {"vocab_size": 257, "max_seq_len": SEQ_LEN}
LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {}, "tensor": {"tensor": 2}, "tensor, whole sequences": {"tensor": 2, "sequence": False},
    "gpipe": {"pipeline": 2, "schedule": "gpipe"}, "1f1b": {"pipeline": 2},
    "interleaved": {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 2},
    "zb-h1": {"pipeline": 2, "schedule": "zb-h1"}, "zb-h2": {"pipeline": 2, "schedule": "zb-h2"},
    "zb-v": {"pipeline": 2, "schedule": "zb-v", "virtual_stages": 2},
    "context": {"context": 2}, "context 4": {"context": 4},
    "zero 0": {"data": 2, "zero": 0}, "zero 1": {"data": 2, "zero": 1}, "zero 2": {"data": 2, "zero": 2},
    "zero 3": {"data": 2, "zero": 3}, "reproducible": {"data": 2, "reproducible": True},
    "tensor × pipeline": {"tensor": 2, "pipeline": 2}, "tensor × context": {"tensor": 2, "context": 2},
    "tensor × zero 3, recomputed": {"tensor": 2, "data": 2, "zero": 3, "recompute": "full"},
    "zb-v × zero 2": {"pipeline": 2, "schedule": "zb-v", "virtual_stages": 2, "data": 2, "zero": 2},
    "context × zero 1": {"context": 2, "data": 2},
}


def write_chats(path: Path, number: int = 60, seed: int = 0, longest: int = 30) -> Path:
    """Conversations of one or two answers: the letters of the question, sorted."""
    draw = random.Random(seed)

    def turns(count: int) -> list[dict[str, str]]:
        asked = ["".join(draw.choices("abcdefgh 好", k=draw.randint(1, longest // 4))) for _ in range(count)]
        return [turn for text in asked for turn in ({"role": "user", "content": text},
                                                     {"role": "assistant", "content": "".join(sorted(text)) + "!"})]

    lines = [json.dumps({"messages": turns(draw.choice([1, 1, 2]))}, ensure_ascii=False) for _ in range(number)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def chat_config(folder: Path, name: str = "run", steps: int = 5, **sections: dict[str, Any]) -> Config:
    """A small run on conversations of `folder`."""
    for file, seed in (("train.jsonl", 0), ("valid.jsonl", 1)):
        if not (folder / file).exists():
            write_chats(folder / file, seed=seed)
    defaults: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder / name), "device": "cpu", "objective": "sft"}, "model": MODEL,
        "data": {"tokenizer": "bytes", "template": "plain", "seq_len": SEQ_LEN,
                 "train": [{"path": str(folder / "train.jsonl")}], "valid": [{"path": str(folder / "valid.jsonl")}]},
        "batch": {"global": 4}, "checkpoint": {"every": 2, "keep": 0}, "eval": {"every": 2, "batches": 2}}
    config = tiny_config(**{section: defaults.get(section, {}) | sections.get(section, {})
                            for section in defaults.keys() | sections.keys()})
    return Config.model_validate(config.to_dict() | {"steps": steps})


@cache
def opened(prefix: str, packed: bool) -> ConversationSource:
    return ConversationSource.open(prefix, SourceConfig(path=prefix), Fit(SEQ_LEN, 256, packed), 257)


def whole(samples: Sequence[Sample]) -> Batch:
    """Samples as one batch on one rank, with what follows from their documents."""
    return collate(samples).batch


def packed_batch(prefix: str, with_ptx: bool, config: Config, step: int) -> Batch:
    """Rows of conversations; with `with_ptx` every fourth row is text, of which all is learned."""
    source, draw = opened(prefix, True), np.random.default_rng(step)
    samples = [source.window((step * ROWS + row) % source.num_windows, 0) for row in range(config.batch.global_)]
    if with_ptx:
        text = Sample(draw.integers(0, 257, SEQ_LEN + 1), None, None, 1, 0, {PTX: np.array(True)})
        samples = [text if row % 4 == 3 else replace(sample, extra={PTX: np.array(False)})
                   for row, sample in enumerate(samples)]
    return whole(samples)


def token_losses(model: Transformer, batch: Batch) -> Tensor:
    logits = model(batch.tokens_SB, batch)
    losses = F.cross_entropy(logits.flatten(0, 1), batch.labels_SB.flatten(), reduction="none")
    return losses.view_as(batch.labels_SB) * batch.loss_mask_SB


def plain_supervised(model: Transformer, batch: Batch) -> list[Tensor]:
    return [token_losses(model, batch).sum()]


def plain_with_ptx(weight: float, model: Transformer, batch: Batch) -> list[Tensor]:
    losses, ptx, mask = token_losses(model, batch), batch.extra[PTX], batch.loss_mask_SB
    chat, text = losses[:, ~ptx].sum(), losses[:, ptx].sum()
    return [chat + weight * text, chat, mask[:, ~ptx].sum().float(), text, mask[:, ptx].sum().float()]


def weighted(weight: float, batch: Batch) -> float:
    per_row = batch.loss_mask_SB.sum(0)
    return float((per_row * torch.where(batch.extra[PTX], weight, 1.0)).sum())


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Task]:
    folder = tmp_path_factory.mktemp("sft")
    config = chat_config(folder)
    prefix = prepared(config, say=lambda line: None)[str(folder / "train.jsonl")]
    return {"sft": Task(Supervised(), partial(packed_batch, prefix, False), plain_supervised,
                        count_labels),
            "ptx": Task(SupervisedWithPretraining(0.3), partial(packed_batch, prefix, True),
                        partial(plain_with_ptx, 0.3), partial(weighted, 0.3))}


def count_labels(batch: Batch) -> int:
    return int(batch.loss_mask_SB.sum())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_one_process(layout: str, tasks: dict[str, Task]) -> None:
    config = tiny_config(parallel=LAYOUTS[layout], model=MODEL, data={"seq_len": SEQ_LEN}, batch={"global": ROWS})
    check(run_layout(config, 5, tasks["sft"]), reference(config, 5, tasks["sft"]))


@pytest.mark.parametrize("layout", ["single", "tensor × pipeline", "context", "zero 3", "zb-v × zero 2"])
def test_pretraining_data_mixed_in(layout: str, tasks: dict[str, Task]) -> None:
    config = tiny_config(parallel=LAYOUTS[layout], model=MODEL, data={"seq_len": SEQ_LEN}, batch={"global": ROWS})
    check(run_layout(config, 3, tasks["ptx"]), reference(config, 3, tasks["ptx"]))


def one_by_one(prefix: str, config: Config, rows: range) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients in float64, each conversation alone: no row, no padding, no document mask."""
    source = opened(prefix, True)
    model = Transformer(config.model).double()
    initialise(model, config.run.seed)
    summed, count = torch.zeros((), dtype=torch.float64), 0
    for number in (number for row in rows for number in source.rows[row]):
        [text] = source.corpus.texts(number)
        tokens = torch.from_numpy(text.tokens).unsqueeze(1)
        batch = Batch(tokens[:-1], torch.arange(len(tokens) - 1).unsqueeze(1), tokens[1:],
                      torch.from_numpy(text.learned[1:]).unsqueeze(1))
        summed = summed + token_losses(model, batch).sum()
        count += int(text.learned[1:].sum())
    (summed / count).backward()
    return summed.item() / count, {spec_of(p).name: p.grad.float() for p in model.parameters()}


def test_packed_is_unpacked(tasks: dict[str, Task]) -> None:
    batch = tasks["sft"].batch
    assert isinstance(batch, partial)
    [prefix, _] = batch.args
    config = tiny_config(model=MODEL, data={"seq_len": SEQ_LEN}, batch={"global": ROWS})
    loss, gradients = one_by_one(prefix, config, range(ROWS, 2 * ROWS))
    [result] = run_distributed(train_layout, 1, config, 1, tasks["sft"])
    assert result.losses[0] == pytest.approx(loss, rel=1e-5)
    got = {name: values for name, _, _, values in result.gradients}
    assert got.keys() == gradients.keys()
    for name, want in gradients.items():
        torch.testing.assert_close(got[name].view_as(want), want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
    assert max(map(len, (opened(prefix, True).rows[row] for row in range(ROWS, 2 * ROWS)))) > 1


def test_rows_unpacked_hold_one_each(tasks: dict[str, Task]) -> None:
    batch = tasks["sft"].batch
    assert isinstance(batch, partial)
    packed, single = opened(batch.args[0], True), opened(batch.args[0], False)
    assert single.num_windows == len(single.corpus) > packed.num_windows
    samples = [[source.window(row, 0) for row in range(source.num_windows)] for source in (packed, single)]
    learned = [sorted(int(sample.loss_mask.sum()) for sample in rows) for rows in samples]
    assert sum(learned[0]) == sum(learned[1]) and samples[1][0].document_ids is None


def test_end_of_what_is_learned(tmp_path: Path) -> None:
    corpora = open_corpora(chat_config(tmp_path), say=lambda line: None)
    assert corpora.end_ids == (256,)
