"""Copies that drift apart, and ranks that disagree on a collective, are noticed and named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.config import Config
from engine.distributed.collectives import CollectiveMismatch, all_reduce
from engine.distributed.topology import Topology
from engine.optim.optimizer import make_optimizer
from engine.parallel.parallelize import parallelize
from engine.parallel.replicas import ReplicasDiffer, _hash, check_replicas
from tests.kit.distributed import mesh_for, run_distributed
from tests.kit.layouts import tiny_config


def corrupt_and_check(config: Config, rank: int, name: str, attribute: str) -> str:
    """What the check says when on `rank` one element is wrong in a parameter, in its master or in a moment."""
    mesh = mesh_for(Topology.of(config))
    model = parallelize(config, mesh)
    model.initialise(config.run.seed)
    moments = make_optimizer(model.buckets, config.optim, model.operations).moments
    check_replicas(model, 1, moments)
    for number, bucket in enumerate(model.buckets):
        for entry in bucket.entries:
            if mesh.rank == rank and entry.spec.name == name:
                if attribute == "parameter":
                    entry.parameter.data.view(-1)[0] += 1
                else:
                    (bucket.master if attribute == "master" else moments[attribute][number])[:] += 1
    try:
        check_replicas(model, 2, moments)
    except ReplicasDiffer as error:
        return str(error)
    return ""


NORM, EMBEDDING = "layers.1.input_layernorm.weight", "embedding.weight"


@pytest.mark.parametrize(("layout", "rank", "name", "attribute", "says"), [
    ({"data": 2}, 1, EMBEDDING, "parameter", "embedding.weight: ranks [0] ≠ [1]"),
    ({"data": 4, "zero": 0}, 2, NORM, "parameter", "layers.1.input_layernorm.weight: ranks [0, 1, 3] ≠ [2]"),
    ({"data": 2, "zero": 0}, 0, NORM, "exp_avg_sq", f"exp_avg_sq of {NORM}: ranks [0] ≠ [1]"),
    ({"data": 4, "zero": 1, "zero_shard": 2}, 3, EMBEDDING, "exp_avg",
     "exp_avg of layers.0.mlp.linear_fc1.weight: ranks [1] ≠ [3]"),
    ({"data": 4, "zero": 3, "zero_shard": 2}, 3, NORM, "master", "ranks [1] ≠ [3]"),
    ({"data": 2, "zero": 3}, 1, NORM, "master", ""),
    ({"tensor": 2}, 0, NORM, "parameter", "layers.1.input_layernorm.weight: ranks [0] ≠ [1]"),
    ({"pipeline": 4, "zero": 2}, 3, EMBEDDING, "master", "tied embedding: ranks [0] ≠ [3]"),
])
def test_a_drifted_copy_is_named(layout: dict[str, int], rank: int, name: str, attribute: str, says: str) -> None:
    config = tiny_config(parallel=layout, model={"tie_embeddings": True})
    messages = run_distributed(corrupt_and_check, config.parallel.world_size, config, rank, name, attribute)
    assert len(set(messages)) == 1, "all know the same"
    assert says in messages[0] and bool(says) == ("step 2" in messages[0]), messages[0]


def test_a_hash_tells_any_bit_and_a_change_of_all_alike() -> None:
    assert int(_hash(torch.ones(0))) == 0
    for size in (1, 2, 62, 63, 64, 126, 1000):
        vector = torch.ones(size)
        assert _hash(vector) == _hash(vector.clone()) != _hash(vector * 2)
        for place in range(0, size, 61):
            for bit in (0, 22, 30):
                flipped = vector.clone()
                flipped.view(torch.int32)[place] ^= 1 << bit
                assert _hash(flipped) != _hash(vector), (size, place, bit)


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
