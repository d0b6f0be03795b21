"""Copies that drift apart, and ranks that disagree on a collective, are noticed and named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.config import Config
from engine.distributed.collectives import CollectiveMismatch, all_reduce
from engine.distributed.topology import Topology
from engine.parallel.parallelize import parallelize
from engine.parallel.replicas import ReplicasDiffer, check_replicas
from tests.kit.distributed import mesh_for, run_distributed
from tests.kit.layouts import tiny_config


def corrupt_and_check(config: Config, rank: int, name: str, attribute: str) -> str:
    """On one rank: what the check says when `rank` has one wrong element in the parameter `name`, or in its master."""
    mesh = mesh_for(Topology.of(config))
    model = parallelize(config, mesh)
    model.initialise(config.run.seed)
    check_replicas(model, 1)
    for bucket in model.buckets:
        for entry in bucket.entries:
            if mesh.rank == rank and entry.spec.name == name:
                target = entry.parameter if attribute == "parameter" else bucket.master
                target.data.view(-1)[0] += 1
    try:
        check_replicas(model, 2)
    except ReplicasDiffer as error:
        return str(error)
    return ""


NORM, EMBEDDING = "layers.1.input_layernorm.weight", "embedding.weight"


@pytest.mark.parametrize(("layout", "rank", "name", "attribute", "says"), [
    ({"data": 2}, 1, EMBEDDING, "parameter", "embedding.weight: ranks [0] ≠ [1]"),
    ({"data": 4, "zero": 0}, 2, NORM, "parameter", "layers.1.input_layernorm.weight: ranks [0, 1, 3] ≠ [2]"),
    ({"data": 4, "zero": 3, "zero_shard": 2}, 3, NORM, "master", "ranks [1] ≠ [3]"),
    ({"tensor": 2}, 0, NORM, "parameter", "layers.1.input_layernorm.weight: ranks [0] ≠ [1]"),
    ({"pipeline": 4, "zero": 2}, 3, EMBEDDING, "master", "tied embedding: ranks [0] ≠ [3]"),
])
def test_a_drifted_copy_is_named(layout: dict[str, int], rank: int, name: str, attribute: str, says: str) -> None:
    config = tiny_config(parallel=layout, model={"tie_embeddings": True})
    messages = run_distributed(corrupt_and_check, config.parallel.world_size, config, rank, name, attribute)
    assert any(says in message for message in messages), messages
    assert "step 2" in messages[rank]


def mismatched(rank_with_another_shape: int) -> str:
    mesh = mesh_for(Topology(tensor=2))
    axis = replace(mesh.tensor, checked=True)
    all_reduce(torch.ones(3), axis)      # agreeing: passes
    try:
        all_reduce(torch.ones(4 if mesh.rank == rank_with_another_shape else 3), axis)
    except CollectiveMismatch as error:
        return str(error)
    return ""


def test_ranks_that_bring_different_shapes_are_told_so() -> None:
    for message in run_distributed(mismatched, 2, 1):
        assert "tensor axis" in message
        assert "rank 0: all-reduce of float32[3]" in message and "rank 1: all-reduce of float32[4]" in message
