"""Meshes on parts of a job: their groups meet on every rank, wherever the parts lie, and cost little in a large job."""

from __future__ import annotations

import time
from itertools import permutations

import pytest
import torch
import torch.distributed as dist

from engine.distributed.collectives import all_gather, all_reduce
from engine.distributed.mesh import Job, Mesh
from engine.distributed.topology import Topology
from engine.errors import RequestError
from tests.kit.distributed import run_distributed
from tests.kit.fake import fake_rank

NUM_RANKS = 6
# Disjoint, overlapping, equal, nested; the numbers of groups of ranks that share one differ.
PARTS = [
    (range(4), Topology(pipeline=2, tensor=2)),
    (range(2, 6), Topology(pipeline=2, data=2)),
    (range(2), Topology(tensor=2)),
    (range(2, 4), Topology(data=2)),
    (range(6), Topology(pipeline=3, data=2, tied=True)),
    (range(2, 6), Topology(tensor=4)),
    (range(3, 6), Topology(pipeline=3, tied=True)),
    (range(6), Topology(data=6, shard=2)),
    (range(5, 6), Topology()),
]


def talk(parts: list[tuple[range, Topology]]) -> list[str]:
    """On one rank: what goes wrong when every mesh's every axis adds up and gathers what its ranks are called."""
    job, wrong = Job("cpu", timeout_seconds=30), []
    meshes = [job.mesh_on(ranks, topology) for ranks, topology in parts]
    assert [mesh is not None for mesh in meshes] == [dist.get_rank() in ranks for ranks, _ in parts]
    for (ranks, topology), mesh in zip(parts, meshes, strict=True):
        if mesh is None:
            continue
        assert mesh.rank == dist.get_rank() - ranks.start
        for name, members in topology.axes_of(mesh.rank).items():
            axis = getattr(mesh, name)
            mine = torch.tensor([dist.get_rank()])
            total, everyone = mine.clone(), all_gather(mine, axis).tolist()
            all_reduce(total, axis)
            expected = [member + ranks.start for member in members]
            if (everyone, int(total), list(axis.ranks)) != (expected, sum(expected), expected):
                wrong.append(f"{name} of {ranks}: {everyone}, {total}")
    return wrong


@pytest.mark.parametrize("order", [PARTS, PARTS[::-1]], ids=["forwards", "backwards"])
def test_groups_of_overlapping_meshes_meet(order: list[tuple[range, Topology]]) -> None:
    assert run_distributed(talk, NUM_RANKS, order, timeout_seconds=60) == [[]] * NUM_RANKS


def test_every_order_of_three_overlapping_meshes() -> None:
    for order in permutations(PARTS[:2] + PARTS[4:5]):
        assert run_distributed(talk, NUM_RANKS, list(order), timeout_seconds=60) == [[]] * NUM_RANKS


def groups_made(parts: list[tuple[range, Topology]]) -> list[tuple[int, ...]]:
    """On one rank: the groups that it is a member of afterwards, in the order in which they were made."""
    job = Job("cpu")
    for ranks, topology in parts:
        job.mesh_on(ranks, topology)
    return [ranks for (_, ranks), group in job._groups.items() if group is not None]


@pytest.mark.parametrize("parts", [PARTS, PARTS[4:5], [(range(6), Topology(pipeline=6))]], ids=len)
def test_nothing_is_created_that_is_not_used(parts: list[tuple[range, Topology]]) -> None:
    """A rank has the groups of its own axes, each once; those that share one have made it in the same order."""
    made = run_distributed(groups_made, NUM_RANKS, parts)
    everybody = tuple(range(NUM_RANKS))
    for rank, groups in enumerate(made):
        axes = {tuple(member + ranks.start for member in members) for ranks, topology in parts if rank in ranks
                for members in topology.axes_of(rank - ranks.start).values()}
        assert len(set(groups)) == len(groups)
        assert set(groups) == {ranks for ranks in axes if len(ranks) > 1} | {everybody}
    order = list(dict.fromkeys(ranks for groups in made for ranks in groups))
    positions = [[order.index(ranks) for ranks in groups if ranks != everybody] for groups in made]
    shared = [(a, b) for a, b in permutations(range(NUM_RANKS), 2)]
    for a, b in shared:
        common = set(positions[a]) & set(positions[b])
        assert [p for p in positions[a] if p in common] == [p for p in positions[b] if p in common]


@pytest.mark.parametrize(("ranks", "size"), [(range(4, 8), 4), (range(4), 2), (range(2, 2), 1), (range(0, 6, 2), 3)])
def test_a_part_that_is_not_there_is_refused(ranks: range, size: int) -> None:
    with fake_rank(0, NUM_RANKS) as job, pytest.raises(RequestError, match="cannot lie on ranks"):
        job.mesh_on(ranks, Topology(data=size))


def test_a_mesh_of_another_size_than_the_job_is_refused() -> None:
    with fake_rank(0, NUM_RANKS) as job, pytest.raises(RequestError, match="needs 4 processes, the job has 6"):
        job.mesh(Topology(data=4))


ROLES = [(range(2048), Topology(pipeline=8, data=32, tensor=8)), (range(1024), Topology(tensor=8, data=128)),
         (range(1024, 1536), Topology(pipeline=8, data=8, tensor=8)), (range(1536, 2048), Topology(data=64, tensor=8))]


def test_four_roles_on_2048_ranks() -> None:
    """The walk through everybody's groups is a matter of milliseconds, and a rank joins a handful of them."""
    with fake_rank(777, 2048) as job:
        start = time.process_time()
        meshes: list[Mesh | None] = [job.mesh_on(ranks, topology) for ranks, topology in ROLES]
        seconds = time.process_time() - start
        members = [ranks for (_, ranks), group in job._groups.items() if group is not None]
    assert [mesh is not None for mesh in meshes] == [True, True, False, False]
    assert len(members) <= 1 + 3 + 3
    assert seconds < 1
