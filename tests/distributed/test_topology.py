"""Rank algebra: the README's picture, and that every direction divides the job into groups."""

from __future__ import annotations

from itertools import product

import pytest

from engine.distributed.topology import AXES, Topology
from engine.errors import ConfigError
from tests.kit.layouts import tiny_config


def test_the_picture_of_the_readme() -> None:
    """Eight processes as tensor 2 × pipeline 2 × data 2."""
    topology = Topology(pipeline=2, data=2, tensor=2)
    assert topology.coordinates(6) == {"pipeline": 1, "data": 1, "context": 0, "tensor": 0}
    assert topology.rank(pipeline=1, data=1) == 6
    assert topology.axes_of(6) == {
        "tensor": (6, 7), "context": (6,), "pipeline": (2, 6), "data": (4, 6), "gradient": (4, 6), "shard": (4, 6),
        "replicate": (6,), "copies": (6,), "ends": (6,), "world": tuple(range(8))}
    tied = Topology(pipeline=3, data=2, tied=True)
    assert [tied.axes_of(rank)["ends"] for rank in range(6)] == [(0, 4), (1, 5), (2,), (3,), (0, 4), (1, 5)]


@pytest.mark.parametrize(("schedule", "chunks", "meet"),
                         [("1f1b", 1, True), ("interleaved", 2, True), ("zb-v", 2, False)])
def test_both_ends_of_a_v_are_on_one_stage(schedule: str, chunks: int, meet: bool) -> None:
    """A tied embedding is there once; no group is made for two copies to meet in."""
    config = tiny_config(model={"tie_embeddings": True},
                         parallel={"pipeline": 2, "schedule": schedule, "virtual_stages": chunks})
    assert Topology.of(config).axes_of(0)["ends"] == ((0, 1) if meet else (0,))


@pytest.mark.parametrize("shard", [0, 1, 2, 4, 8])
def test_every_direction_divides_the_job(shard: int) -> None:
    topology = Topology(pipeline=2, data=4, context=2, tensor=3, shard=shard)
    everybody = [topology.axes_of(rank) for rank in range(48)]
    for name in everybody[0]:
        groups = {axes[name] for axes in everybody}
        assert sorted(rank for group in groups for rank in group) == list(range(48))
        assert all(rank in axes[name] for rank, axes in enumerate(everybody))
        assert len({len(group) for group in groups}) == 1                  # all ranks create equally many groups
        if name in AXES:
            for group in groups:                                               # they differ along that axis only
                indices = [tuple(i for axis, i in topology.coordinates(r).items() if axis != name) for r in group]
                assert len(set(indices)) == 1 and len(group) == getattr(topology, name)
    for axes in everybody:
        assert len(axes["shard"]) == (shard or 8) and len(axes["replicate"]) * len(axes["shard"]) == 8
        assert set(axes["shard"]) & set(axes["replicate"]) == {min(set(axes["shard"]) & set(axes["replicate"]))}


def test_coordinates_and_ranks_are_inverse() -> None:
    topology = Topology(pipeline=2, data=3, context=2, tensor=2)
    for rank, indices in enumerate(product(range(2), range(3), range(2), range(2))):
        assert topology.coordinates(rank) == dict(zip(AXES, indices, strict=True))
        assert topology.rank(**topology.coordinates(rank)) == rank


def test_a_degree_is_at_least_one() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.context is 0"):
        Topology(context=0)
