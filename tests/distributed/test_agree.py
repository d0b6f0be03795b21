"""What all ranks know alike, whatever their number, in a logarithm of messages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.distributed.agree import gather_bytes, gather_json, gather_numbers, maximum, share_bytes, share_json
from engine.distributed.topology import Topology
from tests.kit.distributed import job, run_distributed
from tests.kit.fake import fake_rank


def agree(ranks: range) -> list[Any]:
    """On one rank: everything once, in the group of some of them; the others see nothing."""
    mesh = job().mesh_on(ranks, Topology(data=len(ranks)))
    if mesh is None:
        return []
    rank, group = mesh.rank, mesh.world.group
    return [maximum([rank, -rank, 7], group), gather_bytes(b"x" * (rank * 3 % 5), group),
            gather_json({"rank": rank, "ä": None}, group), share_json([rank, "ö"], group),
            share_bytes(bytes([rank]) * 5 if rank % 2 == 0 else b"", group), gather_numbers([rank / 3, -1e-9], group)]


@pytest.mark.parametrize("ranks", [range(5), range(1, 5), range(2, 5), range(2), range(3, 4)], ids=str)
def test_everybody_knows_the_same(ranks: range) -> None:
    n = len(ranks)
    expected = [[n - 1, 0, 7], [b"x" * (rank * 3 % 5) for rank in range(n)],
                [{"rank": rank, "ä": None} for rank in range(n)], [0, "ö"], b"\0" * 5,
                [[rank / 3, -1e-9] for rank in range(n)]]
    answers = run_distributed(agree, 5, ranks)
    assert answers == [expected if rank in ranks else [] for rank in range(5)]


def test_alone() -> None:
    assert maximum([3, -1], None) == [3, -1]
    assert gather_bytes(b"", None) == [b""]
    assert gather_json([1], None) == [[1]] and gather_numbers([1.5], None) == [[1.5]]
    assert share_json({"a": 1}, None) == {"a": 1}


@pytest.mark.parametrize("world_size", [2, 7, 64, 2048])
def test_messages_grow_with_the_logarithm(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted on one rank of a job that is not there."""
    sent: list[int] = []

    def isend(x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        sent.append(x.numel() * x.element_size())

    def irecv(x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        x.fill_(4)

    with fake_rank(world_size - 1, world_size) as here:
        group = here.world.group
        monkeypatch.setattr(dist, "isend", isend)
        monkeypatch.setattr(dist, "irecv", irecv)
        rounds = math.ceil(math.log2(world_size))
        maximum([1, 2, 3], group)
        assert sent == [24] * rounds
        sent.clear()
        assert len(gather_bytes(b"abcd", group)) == world_size
        assert len(sent) == 2 * rounds and sum(sent) == (world_size - 1) * (8 + 4)
