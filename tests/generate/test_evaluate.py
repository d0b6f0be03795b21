"""Evaluation counts every window once, in every layout, and bytes are bytes of the text."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from engine.config import Config
from engine.data.indexed import IndexedDataset
from engine.data.tokenizer import ByteTokenizer
from engine.distributed.topology import Topology
from engine.generate.evaluate import Scores, open_corpus, sum_of_losses, text_bytes
from engine.generate.load import Wanted, inference_config, load_model, open_shared
from engine.model.context import Batch
from tests.kit.distributed import mesh_for, run_distributed
from tests.kit.finished_run import DOCUMENTS, make_corpus, make_run, run_config
from tests.kit.models import whole_model

SEQ_LEN = 16


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("eval"), run_config())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "held")


def losses(config: Config, corpus: str) -> torch.Tensor:
    """Of every predicted token in all windows, by a plain forward pass: [windows, SEQ_LEN]."""
    stream = IndexedDataset(corpus)
    tokens = torch.tensor(stream.tokens(0, stream.num_tokens).astype(int))
    windows = (len(tokens) - 1) // SEQ_LEN
    x, y = (tokens[shift : windows * SEQ_LEN + shift].view(windows, SEQ_LEN).T for shift in (0, 1))
    with torch.no_grad():
        logits = whole_model(config)(x, Batch(x, torch.arange(SEQ_LEN).unsqueeze(1)))
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y).T


def evaluated(run: Path, corpus: str, topology: Topology, windows: int) -> float:
    """Runs on one rank: the checkpoint into this layout, then its loss."""
    mesh = mesh_for(topology)
    reader = open_shared(run, mesh)
    config = inference_config(reader, topology, Wanted(micro=4, num_microbatches=2))
    return sum_of_losses(load_model(reader, config, mesh), open_corpus(corpus, config, ByteTokenizer().info), windows)


TOPOLOGIES = (Topology(), Topology(tensor=2), Topology(pipeline=2), Topology(data=2), Topology(tensor=2, pipeline=2),
              Topology(tensor=4), Topology(pipeline=3))


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda t: f"pp{t.pipeline}-dp{t.data}-tp{t.tensor}")
def test_loss_is_that_of_a_plain_forward_pass(run: Path, corpus: str, topology: Topology) -> None:
    want = losses(run_config(), corpus)
    assert len(want) % 8 and len(want) > 16, "there should be several steps, the last one not full"
    for windows in (len(want), 4):
        expected = want[:windows].sum().item()
        for got in run_distributed(evaluated, topology.world_size, run, corpus, topology, windows):
            assert got == pytest.approx(expected, rel=1e-6)


def test_bytes_are_those_of_the_text(corpus: str) -> None:
    dataset, tokenizer = IndexedDataset(corpus), ByteTokenizer()
    everything = sum(len(text.encode()) for text in DOCUMENTS)
    assert text_bytes(dataset, dataset.num_tokens - 1, tokenizer) == everything - 1       # nothing predicts the first
    first = len(DOCUMENTS[0])
    assert text_bytes(dataset, first, tokenizer) == first - 1                             # the end has no bytes
    assert text_bytes(dataset, first + 1, tokenizer) == first


def test_scores() -> None:
    scores = Scores.of(2 * 16 * math.log(8), windows=2, of_windows=5, seq_len=16, text_bytes=64, seconds=0.5)
    assert (scores.loss, scores.perplexity) == pytest.approx((math.log(8), 8))
    assert scores.bits_per_byte == pytest.approx(2 * 16 * 3 / 64)
    assert "bits per byte 1.5000" in scores.lines() and "the first 2 of 5 windows of 16" in scores.lines()
    assert "bits per byte n/a" in Scores.of(1.0, 1, 1, 16, None, 1.0).lines()
