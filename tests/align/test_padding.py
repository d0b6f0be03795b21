"""Padding that no row of a microbatch needs is not computed, and every layout is still one process on whole rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from corpus_tools.conversations.start import open_corpora
from engine.config import Config
from engine.data.sample import Sample
from engine.distributed.mesh import Mesh
from engine.model.context import Batch
from engine.model.fields import END, MARGIN, NOISE
from engine.train.batches import Microbatches, collate, row_multiple
from tests.align.test_layouts import LAYOUTS, TASKS, reward_of_a_text
from tests.align.test_sft import chat_config
from tests.kit.layouts import check, reference, run_layout, tiny_config
from tests.kit.runs import metrics, train


def row_of(batch: Batch, index: int) -> Sample:
    """As a data source gives it."""
    tokens = torch.cat((batch.tokens_SB[:1, index], batch.labels_SB[:, index])).numpy()
    extra = {field: x.select(field.batch_dim, index).numpy() for field, x in batch.extra.items()}
    return Sample(tokens, batch.loss_mask_SB[:, index].numpy(), None, 0, 0, extra,
                  used=int(extra[END].nonzero()[0].max(initial=-1)) + 1)


def shortened(config: Config, batch: Batch, mesh: Mesh) -> Microbatches:
    """This rank's share of a global batch, as a run reads it; of each row a part has no text."""
    rows = batch.tokens_SB.shape[1] // config.batch.global_ * config.batch.micro
    firsts = [(m * config.parallel.data_size + mesh.data.index) * rows for m in range(config.num_microbatches)]
    host = [collate([row_of(batch, index) for index in range(first, first + rows)], row_multiple(config))
            for first in firsts]
    assert min(each.shape[0] for each in host) < config.data.seq_len
    return Microbatches(host, mesh, uses=config.parallel.virtual_stages)


CASES = [*(("dpo", layout) for layout in ("single", "tensor", "context × tensor", "1f1b × tensor", "interleaved",
                                          "zb-v", "zero 3 × tensor", "zero 2, reproducible")),
         ("reward", "zb-h1 × context"), ("kwise", "zb-h2"), ("orpo", "gpipe")]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_shorter_rows_are_the_same_mathematics(name: str, layout: str) -> None:
    """Stages that exchange activations agree on the length of every microbatch."""
    task, model = TASKS[name]
    config = tiny_config(parallel=LAYOUTS[layout], model=model, data={"pad_to_multiple": 1})
    check(run_layout(config, 3, task, shortened), reference(config, 3, task), cancelled=reward_of_a_text(task))


def test_what_is_left_of_rows() -> None:
    def row(used: int | None, rest: int = 40) -> Sample:
        places = np.arange(40)
        return Sample(np.arange(41), places % 2 == 0, places // 7, 0, 0,
                      {NOISE: places, MARGIN: np.float32(1)}, used)                      # type: ignore[dict-item]

    for used, multiple, left in (((5, 17), 1, 17), ((5, 17), 8, 24), ((0, 0), 1, 1), ((0, 3), 64, 40),
                                 ((39, 2), 16, 40), ((5, None), 8, 40)):
        batch = collate([row(each) for each in used], multiple).batch
        assert batch.tokens_SB.shape == batch.labels_SB.shape == batch.loss_mask_SB.shape == (left, 2)
        assert batch.tokens_SB[:, 0].tolist() == list(range(left)) and batch.labels_SB[-1].tolist() == [left, left]
        assert batch.extra[NOISE].shape == (left, 2) and batch.extra[MARGIN].tolist() == [1, 1]
        assert batch.documents is not None and batch.documents.bounds[0] == (*range(0, left, 7), left)
        assert batch.positions_SB[:, 1].tolist() == [place % 7 for place in range(left)]


@pytest.mark.parametrize(("parallel", "multiple", "want"), [
    ({}, 1, 1), ({"tensor": 2}, 1, 2), ({"tensor": 2, "sequence": False}, 1, 1), ({"context": 2}, 1, 4),
    ({"context": 2, "tensor": 2}, 1, 4), ({"context": 2, "tensor": 4}, 8, 8), ({"context": 4, "tensor": 4}, 12, 48)])
def test_what_layouts_ask_of_the_length(parallel: dict[str, int], multiple: int, want: int) -> None:
    config = tiny_config(parallel=parallel, data={"pad_to_multiple": multiple, "seq_len": 64})
    assert row_multiple(config) == want


def test_a_run_counts_what_it_computes(tmp_path: Path) -> None:
    """Tokens per second would otherwise be those of rows that are mostly padding."""
    config = chat_config(tmp_path, steps=2, data={"pack": False, "valid": []}, batch={"micro": 2, "global": 4})
    samples = open_corpora(config, say=lambda line: None).train.sample
    train(config)
    for step, row in enumerate(metrics(config)):
        pairs = [(samples(first).used, samples(first + 1).used) for first in (4 * step, 4 * step + 2)]
        computed = sum(2 * min(-(-max(pair) // 8) * 8, config.data.seq_len) for pair in pairs)
        assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(computed)
        assert computed < 4 * config.data.seq_len
