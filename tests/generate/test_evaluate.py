"""Evaluation counts every window once, in every layout, and bytes are bytes of the text."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine import cli
from engine.config import Config
from engine.data.indexed import IndexedDataset, IndexedWriter
from engine.data.tokenizer import ByteTokenizer
from engine.data.training_data import Sample
from engine.distributed.topology import Topology
from engine.generate.evaluate import (
    Scores,
    Summed,
    TextSize,
    fitted,
    open_whole,
    strided,
    sum_of_losses,
    text_size,
    windows_of,
)
from engine.generate.load import Wanted, inference_config, load_model, open_shared
from engine.generate.positions import sums_by_position
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
    """Of every predicted token, one window after the other, each by a plain forward pass."""
    stream = IndexedDataset(corpus)
    tokens = torch.tensor(stream.tokens(0, stream.num_tokens).astype(int))
    model, found = whole_model(config), []
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, SEQ_LEN):
            window = tokens[start : start + SEQ_LEN + 1].unsqueeze(1)
            logits = model(window[:-1], Batch(window[:-1], torch.arange(len(window) - 1).unsqueeze(1)))
            found.append(F.cross_entropy(logits.flatten(0, 1), window[1:].flatten(), reduction="none"))
    return torch.cat(found)


def evaluated(run: Path, corpus: str, topology: Topology, windows: int) -> Summed:
    """Runs on one rank: the checkpoint into this layout, then its loss."""
    mesh = mesh_for(topology)
    reader = open_shared(run, mesh)
    config = inference_config(reader, topology, Wanted(micro=4, num_microbatches=2))
    return sum_of_losses(load_model(reader, config, mesh), open_whole(corpus, config, ByteTokenizer().info), windows)


TOPOLOGIES = (Topology(), Topology(tensor=2), Topology(pipeline=2), Topology(data=2), Topology(tensor=2, pipeline=2),
              Topology(tensor=4), Topology(pipeline=3))


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda t: f"pp{t.pipeline}-dp{t.data}-tp{t.tensor}")
def test_loss_is_that_of_a_plain_forward_pass(run: Path, corpus: str, topology: Topology) -> None:
    want = losses(run_config(), corpus)
    assert len(want) % SEQ_LEN and len(want) > 16 * SEQ_LEN, "there should be several steps, the last window not full"
    for windows in (len(want) // SEQ_LEN + 1, 4):
        expected = want[: windows * SEQ_LEN]
        for got in run_distributed(evaluated, topology.world_size, run, corpus, topology, windows):
            assert got.loss == pytest.approx(expected.sum().item(), rel=1e-6)
            assert got.num_tokens == len(expected)


def test_every_token_but_the_first_is_scored_once(run: Path, corpus: str) -> None:
    """Whatever the length of the windows; a corpus shorter than one is one window."""
    reader = open_shared(run, mesh_for(Topology()))
    num_tokens = IndexedDataset(corpus).num_tokens
    for seq_len in (1, 7, 16, 48):
        config = inference_config(reader, Topology(), Wanted(seq_len=seq_len, micro=4))
        data = open_whole(corpus, config, None)
        labels = [label for index in range(data.windows_and_rest) for label in labels_of(data.window(index, 0))]
        assert labels == data.dataset.tokens(1, num_tokens).tolist()
    short = inference_config(reader, Topology(), Wanted(seq_len=60))
    with IndexedWriter(Path(corpus).with_name("short"), np.uint16) as writer:
        writer.add_document(np.arange(40))
    assert fitted(short, str(Path(corpus).with_name("short"))).data.seq_len == 39
    assert fitted(short, corpus) == short


def labels_of(sample: Sample) -> list[int]:
    counted = sample.tokens[1:] if sample.loss_mask is None else sample.tokens[1:][sample.loss_mask]
    return [int(label) for label in counted]


@pytest.mark.parametrize("topology", [Topology(), Topology(pipeline=2), Topology(data=2)], ids=str)
def test_a_model_trained_with_a_document_mask_is_evaluated_with_it(tmp_path: Path, corpus: str,
                                                                   topology: Topology) -> None:
    """Each document alone gives the same losses: those of all its tokens but the first of every window and document."""
    config = run_config().with_changes(data={"document_mask": True})
    run = make_run(tmp_path, config)
    stream, model, want = IndexedDataset(corpus), whole_model(config), []
    edges = stream.document_starts(0, stream.num_tokens).tolist()
    cuts = sorted({0, stream.num_tokens, *edges, *range(SEQ_LEN, stream.num_tokens, SEQ_LEN)})
    with torch.no_grad():
        for start, stop in pairwise(cuts):
            last = stop + (stop % SEQ_LEN == 0 and stop not in edges and stop < stream.num_tokens)
            piece = torch.tensor(stream.tokens(start, last).astype(int)).unsqueeze(1)
            if len(piece) > 1:
                logits = model(piece[:-1], Batch(piece[:-1], torch.arange(len(piece) - 1).unsqueeze(1)))
                want.append(F.cross_entropy(logits.flatten(0, 1), piece[1:].flatten(), reduction="sum").item())
    windows = -(-(stream.num_tokens - 1) // SEQ_LEN)
    for got in run_distributed(evaluated, topology.world_size, run, corpus, topology, windows):
        assert got.num_tokens == stream.num_tokens - len(DOCUMENTS)
        assert got.loss == pytest.approx(sum(want), rel=1e-6)
    tokenizer = ByteTokenizer()
    assert text_size(stream, stream.num_tokens - 1, tokenizer, document_mask=True).bytes == \
        sum(len(text.encode()[1:]) for text in DOCUMENTS)


def test_bytes_and_characters_are_those_of_the_text(corpus: str) -> None:
    dataset, tokenizer = IndexedDataset(corpus), ByteTokenizer()
    everything = "".join(DOCUMENTS)
    assert text_size(dataset, dataset.num_tokens - 1, tokenizer) == \
        TextSize(len(everything.encode()) - 1, len(everything) - 1)                       # nothing predicts the first
    first = len(DOCUMENTS[0])
    assert text_size(dataset, first, tokenizer) == TextSize(first - 1, first - 1)         # the end has no bytes
    assert text_size(dataset, first + 1, tokenizer) == TextSize(first, first)


def strided_losses(config: Config, corpus: str, stride: int, masked: bool) -> list[float]:
    """Of every predicted token, as the textbook has it: the window that begins at each multiple of the stride."""
    stream, model, found = IndexedDataset(corpus), whole_model(config), []
    tokens = torch.tensor(stream.tokens(0, stream.num_tokens).astype(int))
    begins = set(stream.document_starts(0, stream.num_tokens).tolist())
    done = 1                                                          # the first token is not predicted
    for start in range(0, len(tokens), stride):
        stop = min(start + SEQ_LEN, len(tokens) - 1)
        for position in range(done, stop + 1):
            first = max([start, *(edge for edge in begins if masked and edge <= position)])
            if first == position:
                continue
            window = tokens[first:position].unsqueeze(1)
            logits = model(window, Batch(window, torch.arange(len(window)).unsqueeze(1)))[-1, 0]
            found.append(-logits.log_softmax(0)[tokens[position]].item())
        done = max(done, stop + 1)
    return found


@pytest.mark.parametrize("masked", [False, True], ids=["stream", "documents"])
@pytest.mark.parametrize("stride", [3, 8, 15])
def test_a_stride_gives_each_token_what_stands_before_it(tmp_path: Path, stride: int, masked: bool) -> None:
    config = run_config().with_changes(data={"document_mask": masked})
    prefix = str(tmp_path / "held")
    with IndexedWriter(Path(prefix), np.uint16) as writer:
        for length in (5, 23, 1, 40, 7):
            writer.add_document(np.arange(length) * 7 % 200)
    reader = open_shared(make_run(tmp_path / "run", config), mesh_for(Topology()))
    evaluated = inference_config(reader, Topology(), Wanted(micro=4, num_microbatches=2))
    data = open_whole(prefix, evaluated, None)
    with torch.no_grad():
        want = strided_losses(config, prefix, stride, masked)
    got = sum_of_losses(load_model(reader, evaluated, mesh_for(Topology())), data, windows_of(data, stride), stride)
    assert got.num_tokens == len(want) == 75 - (4 if masked else 0)
    assert got.loss == pytest.approx(sum(want), rel=1e-6)
    assert strided(data, SEQ_LEN, 1).tokens.tolist() == data.window(1, 0).tokens.tolist()


def test_scores() -> None:
    summed = Summed(2 * 16 * math.log(8), 2 * 16)
    scores = Scores.of(summed, windows=2, of_windows=5, seq_len=16, stride=16, text=TextSize(64, 32), seconds=0.5)
    assert (scores.loss, scores.perplexity) == pytest.approx((math.log(8), 8))
    assert scores.bits_per_byte == pytest.approx(2 * 16 * 3 / 64)
    assert "bits per byte 1.5000, per character 3.0000" in scores.lines()
    assert "the first 2 of 5 windows of 16" in scores.lines()
    assert "bits per byte n/a" in Scores.of(Summed(1.0, 16), 1, 1, 16, 8, None, 1.0).lines()


def positioned(run: Path, corpus: str, topology: Topology, windows: int) -> list[list[float]]:
    mesh = mesh_for(topology)
    reader = open_shared(run, mesh)
    config = inference_config(reader, topology, Wanted(micro=4, num_microbatches=2))
    data = open_whole(corpus, config, ByteTokenizer().info)
    model = load_model(reader, config, mesh)
    return sums_by_position(model, lambda index: strided(data, SEQ_LEN, index), windows, False).tolist()


def test_loss_by_position_is_that_of_a_plain_forward_pass(run: Path, corpus: str, tmp_path: Path,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    flat = losses(run_config(), corpus)
    windows = len(flat) // SEQ_LEN + 1
    padded = torch.cat((flat, torch.full((windows * SEQ_LEN - len(flat),), math.nan))).view(windows, SEQ_LEN)
    sums, counts = padded.nansum(0).tolist(), (~padded.isnan()).sum(0).tolist()
    for topology in (Topology(), Topology(data=2), Topology(tensor=2, pipeline=2)):
        for got in run_distributed(positioned, topology.world_size, run, corpus, topology, windows):
            assert got[0] == pytest.approx(sums, rel=1e-5) and got[1] == counts
    command = ["eval", str(run), "--data", corpus, "--json", "--tokenizer", "bytes"]
    assert cli.run(command) == 0
    plain = json.loads(capsys.readouterr().out)
    assert cli.run([*command, "--positions", "--svg", str(tmp_path / "p.svg")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["loss"] == pytest.approx(plain["loss"], rel=1e-6) and told["num_tokens"] == plain["num_tokens"]
    assert [(each["first"], each["last"]) for each in told["by_position"]] == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15)]
    assert told["by_position"][3]["loss"] == pytest.approx(sum(sums[4:8]) / sum(counts[4:8]), rel=1e-5)
    assert "position" in (tmp_path / "p.svg").read_text()
    assert cli.run(["eval", str(run), "--data", corpus, "--svg", "x.svg"]) == 2
