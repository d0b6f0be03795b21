"""Live tensors between layouts: bit for bit, with the fewest bytes, through bounded buffers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from engine.config import load_config, resolve_layout
from engine.distributed import reshard as module
from engine.distributed.announce import catalogue_of, ranges_of
from engine.distributed.changes import apply, encode, places_of_changes, size_of_changes
from engine.distributed.ledger import Ledger
from engine.distributed.mesh import meta_mesh
from engine.distributed.pieces import Piece
from engine.distributed.random import generator_for
from engine.distributed.reshard import Reshard, routes
from engine.distributed.topology import Topology
from engine.parallel.parallelize import parallelize
from tests.distributed.test_ledger import ROOT
from tests.kit.distributed import job, run_distributed
from tests.kit.pieces import Layout, assert_loaded, ledger_of_ranks, pieces_of, value

NUM_RANKS = 6
LAYOUTS = [Layout(), Layout(tensor=2), Layout(tensor=4), Layout(pipeline=2, virtual=2), Layout(pipeline=4),
           Layout(pipeline=3), Layout(data=3, zero=2), Layout(data=4, zero=1), Layout(data=5, zero=0),
           Layout(tensor=2, pipeline=3), Layout(tensor=2, pipeline=2, zero=2), Layout(tensor=3, data=2, zero=2),
           Layout(pipeline=2, data=3, zero=2), Layout(tensor=2, data=3, zero=0)]


def pairs(count: int) -> list[tuple[Layout, int, Layout, int]]:
    """Layouts, each with the rank on which it begins."""
    dice = random.Random(0)

    def place() -> tuple[Layout, int]:
        layout = dice.choice(LAYOUTS)
        return layout, dice.randint(0, NUM_RANKS - layout.world_size)

    return [(*place(), *place()) for _ in range(count)]


def on(layout: Layout, first: int, rank: int, empty: bool = False) -> list[Piece]:
    """What a rank holds of a layout that begins at rank `first`; of the model only, as weights move."""
    if not first <= rank < first + layout.world_size:
        return []
    return [piece for piece in pieces_of(layout, rank - first, empty) if piece.key.startswith("model.")]


def fewest_bytes(source: Sequence[Piece], target: Sequence[Piece]) -> int:
    """What a rank needs and does not have, counted element by element."""
    have: dict[str, torch.Tensor] = {}
    for piece in source:
        for box, _ in piece.parts():
            have.setdefault(piece.key, torch.zeros(piece.global_shape, dtype=torch.bool))[box.slices] = True
    return sum(values.element_size() * int((~have[piece.key][box.slices]).sum()) if piece.key in have
               else values.numel() * values.element_size() for piece in target for box, values in piece.parts())


def move(cases: list[tuple[Layout, int, Layout, int]], bucket_bytes: int) -> list[tuple[int, int, int, int]]:
    """On one rank: bytes received, the fewest possible, the largest buffer, and rounds, of every pair."""
    mesh, rank, out = job().mesh(Topology(data=NUM_RANKS)), job().rank, []
    for source_layout, source_first, target_layout, target_first in cases:
        source = on(source_layout, source_first, rank)
        target = on(target_layout, target_first, rank, empty=True)
        way = Reshard.plan(source, target, mesh, bucket_bytes)
        buffers: list[int] = [0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "exchange", watching(module.exchange, buffers))
            way.run(source, target)
        assert_loaded(target)
        for piece in source:                                            # changed, and moved again by the same plan
            piece.tensor.mul_(2)
        way.run(source, target)
        for piece in target:
            for box, values in piece.parts():
                assert torch.equal(values, 2 * value(piece.key, piece.global_shape)[box.slices])
        out.append((way.bytes_received, fewest_bytes(source, target), max(buffers), way.num_rounds))
    return out


def watching(exchange: Callable[..., None], buffers: list[int]) -> Callable[..., None]:
    """The same, noting the bytes of the two buffers behind what is exchanged."""
    def watched(into: torch.Tensor, outgoing: torch.Tensor, *rest: Any) -> None:
        buffers.extend(tensor.untyped_storage().size() for tensor in (into, outgoing))
        exchange(into, outgoing, *rest)

    return watched


@pytest.mark.parametrize("bucket_bytes", [1 << 20, 600])
def test_twenty_pairs_of_layouts(bucket_bytes: int) -> None:
    """On real processes, disjoint, overlapping and equal; with buffers for everything, and for a part of a tensor."""
    by_rank = run_distributed(move, NUM_RANKS, pairs(20), bucket_bytes)
    for case in range(20):
        told = [results[case] for results in by_rank]
        assert [received for received, *_ in told] == [fewest for _, fewest, *_ in told]
        assert all(largest <= bucket_bytes for *_, largest, _ in told)
        assert len({rounds for *_, rounds in told}) == 1
    assert max(rounds for results in by_rank for *_, rounds in results) > (1 if bucket_bytes == 600 else 0)


def test_the_same_layout_moves_nothing_between_ranks() -> None:
    layout = Layout(tensor=2, data=3, zero=2)
    for received, _, largest, rounds in (results[0] for results in run_distributed(
            move, NUM_RANKS, [(layout, 0, layout, 0)], 1 << 20)):
        assert (received, largest, rounds) == (0, 0, 0)


def move_changes(cases: list[tuple[Layout, int, Layout, int]]) -> list[tuple[int, int, int]]:
    """On one rank, of every pair: bytes of all, of a step of AdamW in bf16, and of nothing; each bit for bit."""
    mesh, rank, out = job().mesh(Topology(data=NUM_RANKS)), job().rank, []
    for source_layout, source_first, target_layout, target_first in cases:
        source = bf16(on(source_layout, source_first, rank))
        target = bf16(on(target_layout, target_first, rank, empty=True))
        way = Reshard.plan(source, target, mesh, 1 << 16, delta=True)
        received = []
        for weights in (begun, trained, trained):
            fill_from(source, weights)
            received.append(way.run(source, target))
            for piece in target:
                for box, values in piece.parts():
                    assert torch.equal(values.view(torch.int16),
                                       weights(piece.key, piece.global_shape)[box.slices].view(torch.int16))
        assert received[0] == way.bytes_received
        out.append(tuple(received))
    return out


def bf16(pieces: Sequence[Piece]) -> list[Piece]:
    return [Piece(p.key, p.global_shape, p.box, p.tensor.bfloat16(), p.start) for p in pieces]


def fill_from(pieces: Sequence[Piece], weights: Callable[[str, tuple[int, ...]], torch.Tensor]) -> None:
    for piece in pieces:
        for box, values in piece.parts():
            values.copy_(weights(piece.key, piece.global_shape)[box.slices])


def begun(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    return masters(key, shape).bfloat16()


def masters(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    return 0.02 * torch.randn(shape, generator=generator_for(0, key))


def trained(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """After a step of AdamW at 1e-6, whatever the gradients: their signs decide."""
    weights = masters(key, shape).requires_grad_()
    weights.grad = torch.randn(shape, generator=generator_for(1, key))
    torch.optim.AdamW([weights], lr=1e-6).step()
    return weights.detach().bfloat16()


def test_changes_alone_are_sent_bit_for_bit() -> None:
    """The tensors are so small that the rounding of every encoding to eight bytes counts."""
    by_rank = run_distributed(move_changes, NUM_RANKS, pairs(3))
    every, step, nothing = (sum(told[case][which] for told in by_rank for case in range(3)) for which in range(3))
    assert nothing == 0 and 0 < step < every / 4


def test_a_step_changes_few_of_the_weights_of_a_large_tensor() -> None:
    before, now = (weights("w", (500, 1000)).view(torch.int16) for weights in (begun, trained))
    places = places_of_changes(now, before)
    size = size_of_changes(len(places), now.numel(), 2)
    assert 0.03 < len(places) / now.numel() < 0.05 and size - 6 * len(places) in range(8)     # an eighth of all bytes
    data, into = torch.empty(size, dtype=torch.uint8), before.clone().T.contiguous().T              # any strides
    encode(now, places, data)
    apply(into, len(places), data)
    assert torch.equal(into, now)


def everyone(layout: Layout, first: int = 0) -> list[list[Piece]]:
    return [on(layout, first, rank) for rank in range(NUM_RANKS)]


def test_what_is_sent_is_what_is_received() -> None:
    """By arithmetic: for many pairs, both ends name the same regions."""
    for source_layout, source_first, target_layout, target_first in pairs(40):
        source = ledger_of_ranks(everyone(source_layout, source_first))
        target = ledger_of_ranks(everyone(target_layout, target_first))
        all_routes = [routes(source, target, rank) for rank in range(NUM_RANKS)]
        sent = sorted((rank, part.peer, part.key, part.region)
                      for rank, its in enumerate(all_routes) for part in its.sends)
        received = sorted((part.peer, rank, part.key, part.region)
                          for rank, its in enumerate(all_routes) for part in its.receives)
        assert sent == received


def test_what_cannot_be_moved_is_refused() -> None:
    source, target = everyone(Layout(tensor=2)), everyone(Layout(pipeline=2))
    incomplete = [[piece for piece in held if "norm" in piece.key] for held in source]
    with pytest.raises(ValueError, match="in the source it is not there"):
        routes(ledger_of_ranks(incomplete), ledger_of_ranks(target), 0)
    half = [source[0], *[[]] * 5]
    with pytest.raises(ValueError, match="the source's tiles hold"):
        routes(ledger_of_ranks(half), ledger_of_ranks(target), 0)
    rounded = [[Piece(p.key, p.global_shape, p.box, p.tensor.bfloat16(), p.start) for p in held] for held in target]
    with pytest.raises(ValueError, match=r"bfloat16.* in the target layout, in the source it is"):
        routes(ledger_of_ranks(source), ledger_of_ranks(rounded), 0)


def ledger_of_65b(*changes: str, world_size: int) -> Ledger:
    """Of the weights that the layers use; ranks that differ by their data position hold the same."""
    config = resolve_layout(load_config(ROOT / "configs" / "llama-65b.yaml", ["parallel.data=auto", *changes]),
                            world_size)
    topology = Topology.of(config)
    catalogues, held = [], [(0, ranges_of([]))] * world_size
    for pipeline in range(topology.pipeline):
        for tensor in range(topology.tensor):
            rank = topology.rank(pipeline=pipeline, tensor=tensor)
            pieces = parallelize(config, meta_mesh(topology, rank)).weights()
            catalogues.append(catalogue_of(pieces))
            for data in range(topology.data):
                held[topology.rank(pipeline=pipeline, tensor=tensor, data=data)] = \
                    len(catalogues) - 1, ranges_of(pieces)
    return Ledger.of(catalogues, held)


def test_65b_from_training_to_generating() -> None:
    """Tensor 8 × pipeline 2 × data 4 into tensor 4 × data 16, on meta tensors: each rank gets what it lacks."""
    source = ledger_of_65b("parallel.tensor=8", "parallel.pipeline=2", world_size=64)
    target = ledger_of_65b("parallel.tensor=4", "parallel.pipeline=1", world_size=64)
    for rank in (0, 37):
        its = routes(source, target, rank)
        received = 2 * sum(part.region.num_elements for part in its.receives)
        local = 2 * sum(copy.region.num_elements for copy in its.local)
        mine = [int(tile) for tile in range(len(target)) if rank in target.holders_of(tile)]
        assert received + local == int(target.num_bytes[mine].sum()) > 30e9
        assert local > 0 and {part.peer for part in its.receives} <= set(range(64)) - {rank}

