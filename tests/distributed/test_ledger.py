"""Who holds what: tiles, their copies, and where the elements of a box are."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoint.manifest import Manifest, StoredFile, decode_manifest, encode_manifest
from engine.checkpoint.plan import divide
from engine.config import load_config, resolve_layout
from engine.distributed import announce
from engine.distributed.boxes import Box
from engine.distributed.ledger import Block, Ledger, cover
from engine.distributed.mesh import meta_mesh
from engine.distributed.pieces import Piece
from engine.distributed.topology import Topology
from engine.parallel.parallelize import ParallelModel, parallelize
from tests.kit.distributed import job, run_distributed
from tests.kit.pieces import Layout, ledger_of_ranks, pieces_of, value

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = (Layout(), Layout(tensor=2, data=2, zero=0), Layout(data=4, zero=2), Layout(tensor=2, pipeline=2, zero=2),
           Layout(data=3), Layout(tensor=4, zero=2))


def everyone(layout: Layout) -> list[list[Piece]]:
    return [pieces_of(layout, rank) for rank in range(layout.world_size)]


@settings(max_examples=150, deadline=None)
@given(layout=st.sampled_from(LAYOUTS), data=st.data())
def test_where_the_elements_of_a_box_are(layout: Layout, data: st.DataObject) -> None:
    """Every element once, in a tile that holds it, by everybody who is said to hold it."""
    pieces = everyone(layout)
    ledger = ledger_of_ranks(pieces)
    key = data.draw(st.sampled_from(sorted(ledger.keys)))
    _, shape = ledger.kind(key)
    offset = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    box = Box(offset, tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shape, offset, strict=True)))
    found, left = cover(ledger, key, box)
    assert not left
    count = torch.zeros(shape)
    for tile, region in found:
        count[region.slices] += 1
        for row in range(int(ledger.first[tile]), int(ledger.first[tile + 1])):
            piece = pieces[int(ledger.holders[row])][int(ledger.place[row])]
            assert torch.equal(piece.view(region), value(key, shape)[region.slices])
    expected = torch.zeros(shape)
    expected[box.slices] = 1
    assert torch.equal(count, expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tiles_tell_all_that_everybody_holds(layout: Layout) -> None:
    pieces = everyone(layout)
    ledger = ledger_of_ranks(pieces)
    said = sorted((int(ledger.holders[row]), int(ledger.place[row])) for row in range(len(ledger.holders)))
    assert said == sorted((rank, place) for rank, held in enumerate(pieces) for place, piece in enumerate(held)
                          if piece.tensor.numel())
    assert ledger.elements_held() == {key: prod(ledger.kind(key)[1]) for key in ledger.keys}
    assert list(ledger.num_bytes) == [4 * (stop - start) for start, stop in zip(ledger.start, ledger.stop, strict=True)]


def test_disagreement_about_a_tensor_is_an_error() -> None:
    def piece(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Piece]:
        return [Piece("w", shape, Box.whole(shape), torch.zeros(shape, dtype=dtype))]

    for other in (piece((3, 4)), piece((2, 4), torch.bfloat16)):
        with pytest.raises(ValueError, match=r"w is .* in one place and .* in another"):
            ledger_of_ranks([piece((2, 4)), other])


def test_ranges_that_overlap_without_being_equal() -> None:
    """Allowed in files; each is a tile of its own, and an element is taken from one of them."""
    whole = torch.arange(12.0)
    ranges = [(0, 8), (4, 12), (0, 8), (0, 6)]
    ledger = ledger_of_ranks([[Piece("w", (3, 4), Box.whole((3, 4)), whole[a:b].clone(), a)] for a, b in ranges])
    assert sorted(zip(ledger.start.tolist(), ledger.stop.tolist(), strict=True)) == [(0, 6), (0, 8), (4, 12)]
    found, left = cover(ledger, "w", Box.whole((3, 4)))
    assert not left and sum(region.num_elements for _, region in found) == 12


def told(layout: Layout) -> list[list[Any]]:
    """On one rank: the ledger that everybody's announcements make."""
    ledger = announce.gather_ledger(pieces_of(layout, job().rank), job().world.group)
    return columns(ledger)


def columns(ledger: Ledger) -> list[list[Any]]:
    return [list(ledger.blocks), *(column.tolist() for column in (
        ledger.block, ledger.start, ledger.stop, ledger.first, ledger.holders, ledger.place))]


@pytest.mark.parametrize("layout", [Layout(tensor=2, data=2, zero=0), Layout(data=4, zero=2), Layout(pipeline=4)],
                         ids=str)
def test_all_ranks_know_the_same(layout: Layout) -> None:
    expected = columns(ledger_of_ranks(everyone(layout)))
    for known in run_distributed(told, 4, layout):
        assert sorted(map(str, known[0])) == sorted(map(str, expected[0]))
        assert known[1:5] == expected[1:5] and sorted(known[5]) == sorted(expected[5])


# ------------------------------------------------------------------ 2,048 ranks

PREFIXES = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
JOBS = {"ZeRO 1, tensor 8 × pipeline 8 × data 32": (),
        "ZeRO 3, tensor 8 × data 256": ("parallel.pipeline=1", "parallel.zero=3", "parallel.data=auto")}


def state_pieces(model: ParallelModel) -> list[Piece]:
    return [piece for prefix in PREFIXES for piece in model.shards(prefix, [bucket.master for bucket in model.buckets])]


def ranges_at(model: ParallelModel) -> Callable[[int], np.ndarray]:
    """The ranges of the rank at another data position: shards are equal, so they follow from this one's."""
    entries = [(entry, bucket.master.numel()) for bucket in model.buckets for entry in bucket.entries]
    offset, total, part = (np.array(column) for column in zip(*(
        (entry.offset, entry.spec.box.num_elements, size) for entry, size in entries), strict=True))

    def at(index: int) -> np.ndarray:
        low, high = (np.clip(part * edge - offset, 0, total) for edge in (index, index + 1))
        ranges = np.where((low < high)[:, None], np.stack((low, high), axis=1), 0)
        return np.tile(ranges, (len(PREFIXES), 1)).astype(np.int64)

    return at


def announcements(changes: Sequence[str]) -> tuple[list[bytes], list[bytes]]:
    """What each rank of the LLaMA-65B job tells: the digest of its list, and the message behind it."""
    config = resolve_layout(load_config(ROOT / "configs" / "llama-65b.yaml", changes), 2048)
    topology = Topology.of(config)
    digests, messages = [b""] * 2048, [b""] * 2048
    for pipeline in range(topology.pipeline):
        for tensor in range(topology.tensor):
            model = parallelize(config, meta_mesh(topology, topology.rank(pipeline=pipeline, tensor=tensor)))
            pieces, ranges = state_pieces(model), ranges_at(model)
            assert np.array_equal(ranges(0), announce.ranges_of(pieces))
            text = announce.encode(announce.catalogue_of(pieces))
            for data in range(topology.data):
                rank = topology.rank(pipeline=pipeline, tensor=tensor, data=data)
                digests[rank] = hashlib.sha256(text).digest()[:16]
                messages[rank] = announce.message(ranges(data), text if data == 0 else None)
    return digests, messages


@pytest.mark.parametrize("changes", JOBS.values(), ids=JOBS)
def test_the_state_of_2048_ranks(changes: Sequence[str]) -> None:
    """Shared, planned, written down and read again: under a kilobyte per rank, about a second in all."""
    digests, messages = announcements(changes)
    start = time.process_time()
    division = divide(announce.read_announcements(digests, messages))
    mine = division.of(777)
    planned = time.process_time()
    files = tuple(StoredFile(f"rank-{rank:05d}.safetensors", 1 << 30, "0" * 64) for rank in range(2048))
    text = encode_manifest(Manifest(1, {}, files, division.files))
    encoded = time.process_time()
    read = decode_manifest(text, Path("manifest.json"))
    decoded = time.process_time()

    assert sum(map(len, messages)) / 2048 < 256 and len(text) / 2048 < 512
    assert planned - start < 2 and encoded - planned < 1 and decoded - encoded < 1     # on a machine with other work
    load = np.bincount(division.writers, weights=division.ledger.num_bytes, minlength=2048)
    assert load.max() < 1.05 * load.mean() and len(mine) > 0
    assert columns(read.ledger)[1:5] == columns(division.files)[1:5]
    assert read.ledger.elements_held() == {key: prod(read.ledger.kind(key)[1]) for key in read.ledger.keys}


def test_runs_survive_any_order_of_files() -> None:
    """Whatever the files are, what is written down is read back."""
    random = np.random.default_rng(0)
    blocks = [Block(f"w{i}", "float32", (64, 3), Box.whole((64, 3))) for i in range(20)]
    for _ in range(50):
        edges = [np.unique(np.r_[0, random.choice(191, random.integers(0, 30)) + 1, 192]) for _ in blocks]
        if random.random() < 0.5:
            edges = [np.arange(0, 193, random.choice([1, 4, 16, 64])) for _ in blocks]
        lists = [[Block(*block) for block, its in zip(blocks, edges, strict=True) for _ in its[1:]]]
        ranges = np.array([pair for its in edges for pair in pairwise(its)], np.int64)
        holder = random.integers(0, 7, len(ranges)) if random.random() < 0.5 else np.arange(len(ranges)) * 3 % 7
        held = [(0, np.where((holder == file)[:, None], ranges, 0)) for file in range(7)]
        ledger = Ledger.of(lists, held)
        files = tuple(StoredFile(f"f{i}.safetensors", 1 << 20, "0" * 64) for i in range(7))
        read = decode_manifest(encode_manifest(Manifest(0, {}, files, ledger)), Path("x")).ledger
        assert columns(read)[:5] == columns(ledger)[:5]
        assert read.holders.tolist() == ledger.holders.tolist()
