"""Every operation of a group is one of all its members, in one order; every message between two is sent and received.

gloo forgives a group operation that some members leave out, as long as those that take part wait for each other only.
NCCL does not: the first makes the group's communicator, which takes all members, so the job hangs.  So each rank of
each layout is walked on its own, its operations noted, and the notes of the members of a group laid side by side.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import engine.parallel.pipeline.p2p as p2p
from engine.config import Config
from engine.distributed import collectives
from engine.distributed.mesh import Axis, Job
from engine.distributed.topology import Topology
from engine.optim.adamw import AdamW
from engine.optim.gradients import sum_over_world
from engine.parallel.data import buckets
from engine.parallel.parallelize import parallelize
from engine.parallel.replicas import differences
from tests.kit.fake import fake_rank
from tests.kit.layouts import microbatches, tiny_config
from tests.kit.reference import global_batch

Operations = dict[tuple[int, ...], list[str]]      # by the ranks of the group, or by sender and receiver

FAMILIES: list[dict[str, Any]] = [
    {"tensor": 2}, {"tensor": 2, "sequence": False, "data": 2}, {"pipeline": 3}, {"pipeline": 4, "data": 2},
    {"pipeline": 3, "schedule": "gpipe", "tensor": 2}, {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 2},
    {"pipeline": 4, "schedule": "zb-h1"}, {"pipeline": 3, "schedule": "zb-h2", "data": 2},
    {"pipeline": 2, "schedule": "zb-v", "virtual_stages": 2, "tensor": 2}, {"data": 4, "zero": 0},
    {"data": 4, "zero": 1}, {"data": 4, "zero": 2}, {"data": 4, "zero": 3},
    {"data": 4, "zero": 1, "zero_shard": 2}, {"data": 4, "zero": 3, "zero_shard": 2, "pipeline": 2},
    {"context": 2}, {"context": 4, "zero": 3}, {"context": 2, "tensor": 2, "data": 2},
    {"tensor": 2, "pipeline": 2, "data": 2, "zero": 2}, {"pipeline": 3, "data": 2, "zero": 3},
    {"data": 2, "tensor": 2, "reproducible": True, "zero": 0}, {"data": 2, "pipeline": 3, "reproducible": True},
    {"tensor": 2, "recompute": "full"}, {"pipeline": 3, "debug_collectives": True, "data": 2},
]


@contextmanager
def noted(rank: int) -> Iterator[Operations]:
    """What this process asks `torch.distributed` for, while the context lasts."""
    out: Operations = defaultdict(list)

    def watch(name: str, tensor: Callable[..., Tensor]) -> Callable[..., Any]:
        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def noting(*args: Any, **kwargs: Any) -> Any:
                x = tensor(*args)
                group = args[0][0].group if name == "exchange" else kwargs["group"]
                members = tuple(dist.get_process_group_ranks(group))
                what = f"{name} of {x.dtype} [{x.numel()}]"
                if name in ("send", "receive"):
                    pair = (rank, args[1]) if name == "send" else (args[1], rank)
                    out[pair].append(f"{name} of {x.dtype} [{x.numel()}] tag {kwargs.get('tag')} in {members}")
                else:
                    out[members].append(what)
                return original(*args, **kwargs)
            return noting
        return wrap

    with pytest.MonkeyPatch.context() as patch:
        for owner, name, what, tensor in (
                (collectives, "_all_gather_single", "all-gather", lambda out, x: x),
                (collectives, "_reduce_scatter_single", "reduce-scatter", lambda out, x: x),
                (dist, "all_reduce", "all-reduce", lambda x: x), (dist, "broadcast", "broadcast", lambda x, *_: x),
                (dist, "all_to_all_single", "all-to-all", lambda out, x: x),
                (dist, "batch_isend_irecv", "exchange", lambda operations: operations[0].tensor)):
            patch.setattr(owner, name, watch(what, tensor)(getattr(owner, name)))
        patch.setattr(p2p, "dist", SimpleNamespace(isend=watch("send", lambda x, *_: x)(dist.isend),
                                                   irecv=watch("receive", lambda x, *_: x)(dist.irecv)))
        yield out


def walk(config: Config, rank: int) -> Operations:
    """A step, an evaluation and a comparison of replicas of one rank, alone."""
    parallel = config.parallel
    with fake_rank(rank, parallel.world_size):
        mesh = Job("cpu").mesh(Topology.of(config))
        model = parallelize(config, mesh, bucket_elements=6000)
        optimizer = AdamW(model.buckets, config.optim, model.operations)
        batches = microbatches(config, global_batch(config, 1), mesh)
        with noted(rank) as out:
            losses = model.forward_backward(batches, 1e-3)
            sum_over_world(losses, model.buckets, mesh, reproducible=parallel.reproducible)
            optimizer.step(1e-3, torch.ones(()), torch.zeros(()))
            model.publish()
            sum_over_world(model.evaluate(batches), [], mesh, reproducible=parallel.reproducible)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("engine.parallel.replicas._differences", compare_and_forget)
                differences(model, optimizer.moments)
    return out


def compare_and_forget(tensors: list[tuple[str, Tensor]], axis: Axis) -> list[str]:
    """As the engine's, but that nothing comes back to be compared."""
    if axis.size > 1 and tensors:
        collectives.all_gather(torch.zeros(1, len(tensors), dtype=torch.int64), axis)
    return []


def one_sided(by_rank: list[Operations]) -> list[str]:
    """Groups whose members do not ask for the same in the same order, and messages without their other end."""
    wrong = []
    for members in {members for operations in by_rank for members in operations}:
        told = {rank: operations.get(members, []) for rank, operations in enumerate(by_rank) if rank in members}
        if any("send of" in what or "receive of" in what for said in told.values() for what in said):
            sender, receiver = members
            sent, received = ([what.split(" ", 1)[1] for what in told[rank]] for rank in (sender, receiver))
            if sent != received:
                wrong.append(f"{sender} sends {receiver} {len(sent)} messages, which expects {len(received)}")
        elif any(a != b for a, b in pairwise(told.values())):
            wrong.append(f"group {members}: " + ", ".join(f"rank {rank} {len(said)}" for rank, said in told.items()))
    return wrong


def name_of(layout: dict[str, Any]) -> str:
    return "-".join(f"{k[0:2]}{v}" for k, v in layout.items())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", FAMILIES, ids=name_of)
def test_group_operations_take_all_members(layout: dict[str, Any], tied: bool) -> None:
    config = tiny_config(parallel=layout, model={"tie_embeddings": tied}, batch={"global": 8})
    by_rank = [walk(config, rank) for rank in range(config.parallel.world_size)]
    assert any(by_rank)
    assert not one_sided(by_rank)


def test_an_operation_that_leaves_a_member_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first and the last stage exchange a gradient in the group of the whole pipeline."""
    all_reduce = buckets.all_reduce

    def between_two(x: Tensor, axis: Axis, **options: Any) -> Any:
        if axis.name != "ends":
            return all_reduce(x, axis, **options)
        pipeline = next(group for ranks, group in groups.items() if ranks == (0, 1, 2))
        peer = axis.ranks[1 - axis.index]
        return dist.batch_isend_irecv([dist.P2POp(dist.isend, x, peer, pipeline),
                                       dist.P2POp(dist.irecv, torch.empty_like(x), peer, pipeline)])

    groups: dict[tuple[int, ...], Any] = {}
    create = Job._create

    def remember(self: Job, name: str, ranks: tuple[int, ...]) -> None:
        create(self, name, ranks)
        groups.update({ranks: group for (_, ranks), group in self._groups.items()})

    monkeypatch.setattr(buckets, "all_reduce", between_two)
    monkeypatch.setattr(Job, "_create", remember)
    config = tiny_config(parallel={"pipeline": 3}, model={"tie_embeddings": True}, batch={"global": 8})
    by_rank = [walk(config, rank) for rank in range(3)]
    assert any(found.startswith("group (0, 1, 2): ") for found in one_sided(by_rank))
