"""What is explained on paper is what real processes build; over a whole job it adds up to the model."""

from __future__ import annotations

from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any

import pytest

from engine.config import Config, load_config, resolve_layout
from engine.distributed.boxes import Box
from engine.distributed.topology import Topology
from engine.errors import RequestError
from engine.model.flops import count_parameters
from engine.optim.adamw import AdamW
from engine.parallel.parallelize import parallelize
from engine.plan.explain import Explanation, StateBytes, describe, explain
from engine.plan.words import in_words
from tests.kit.distributed import mesh_for, run_distributed
from tests.kit.layouts import tiny_config
from tests.parallel.test_memory import storage_bytes

ROOT = Path(__file__).resolve().parents[2]


def built(config: Config) -> tuple[Explanation, StateBytes, dict[str, tuple[int, ...]]]:
    """On one rank: what `parallelize` really builds, the bytes of its living storages, and its groups."""
    mesh = mesh_for(Topology.of(config))
    model = parallelize(config, mesh)
    optimizer = AdamW(model.buckets, config.optim, model.operations)
    parameters = [tensor for bucket in model.buckets for tensor in (bucket.param_buffer, bucket.param_shard)]
    owned = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    masters = [bucket.master for bucket in model.buckets if bucket.master.untyped_storage().data_ptr() not in owned]
    measured = StateBytes(
        storage_bytes(parameters),
        storage_bytes(tensor for bucket in model.buckets for tensor in (bucket.grad_buffer, bucket.grad_shard)),
        storage_bytes([*masters, *optimizer.exp_avg, *optimizer.exp_avg_sq]))
    axes = {name: getattr(mesh, name).ranks for name in ("tensor", "context", "pipeline", "data", "gradient", "shard",
                                                         "replicate", "ends", "copies", "world")}
    return describe(model, mesh), measured, axes


@pytest.mark.parametrize("parallel", [
    {}, {"zero": 3}, {"data": 4, "zero": 0}, {"data": 4, "zero": 2}, {"data": 4, "zero": 3, "zero_shard": 2},
    {"data": 2, "reproducible": True}, {"tensor": 2, "data": 2}, {"tensor": 2, "context": 2, "sequence": False},
    {"pipeline": 2, "tensor": 2, "schedule": "zb-h1"},
    {"pipeline": 2, "data": 2, "schedule": "zb-v", "virtual_stages": 2, "zero": 2},
    {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 2, "recompute": "full"},
], ids=lambda parallel: " ".join(f"{key}={value}" for key, value in parallel.items()) or "one process")
@pytest.mark.parametrize("others", [{}, {"model": {"tie_embeddings": True, "qkv_bias": True, "num_kv_heads": 1},
                                         "precision": {"compute": "bf16", "grad_reduce": "bf16"}}],
                         ids=["fp32", "bf16 tied biased"])
def test_equals_what_processes_build(parallel: dict[str, Any], others: dict[str, Any]) -> None:
    config = tiny_config(parallel=parallel, **others)
    for rank, (real, measured, axes) in enumerate(run_distributed(built, config.parallel.world_size, config)):
        on_paper = explain(config, rank)
        assert on_paper == real
        assert on_paper.bytes == measured
        assert on_paper.axes == axes


def assert_tiles(boxes: set[Box], whole: Box) -> None:
    assert sum(box.num_elements for box in boxes) == whole.num_elements
    assert all(box.intersect(whole) == box for box in boxes if box.num_elements)
    assert not any(a.intersect(b) for a, b in combinations(boxes, 2))


@pytest.mark.parametrize(("name", "world_size"), [("llama-65b", 2048), ("llama-7b", 2048), ("llama", 2048),
                                                  ("llama3.2-1b", 256), ("tiny", 1)])
def test_the_slices_of_a_job_are_the_model(name: str, world_size: int) -> None:
    config = resolve_layout(load_config(ROOT / "configs" / f"{name}.yaml"), world_size)
    topology = Topology.of(config)
    assert topology.world_size == world_size
    slices: dict[str, set[Box]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    layers: dict[int, tuple[int, ...]] = {}
    for pipeline in range(topology.pipeline):
        for tensor in range(topology.tensor):
            it = explain(config, topology.rank(pipeline=pipeline, tensor=tensor, data=topology.data - 1))
            layers |= it.layers
            for part in it.parts:
                slices.setdefault(part.name, set()).add(part.slice)
                shapes[part.name] = part.shape
    assert [layer for _, dealt in sorted(layers.items()) for layer in dealt] == list(range(config.model.num_layers))
    assert sum(map(prod, shapes.values())) == count_parameters(config.model).total
    for key, boxes in slices.items():
        assert_tiles(boxes, Box.whole(shapes[key]))


@pytest.mark.parametrize("zero", [1, 3])
def test_the_shards_of_the_replicas_are_the_slice(zero: int) -> None:
    changes = [f"parallel.zero={zero}", "batch.global=32"]
    config = resolve_layout(load_config(ROOT / "configs" / "llama-65b.yaml", changes), 2048)
    replicas = [explain(config, rank) for rank in explain(config, 2047).axes["shard"]]
    assert len(replicas) == 32
    for parts in zip(*(it.parts for it in replicas), strict=True):
        if parts[0].name.startswith(("layers.79.", "final_layernorm")):
            boxes = [box for part in parts for box in part.state]
            assert len(boxes) == len(set(boxes))
            assert_tiles(set(boxes), parts[0].slice)


@pytest.mark.parametrize("parallel", [{"pipeline": 4, "data": 2}, {"pipeline": 2, "tensor": 2, "schedule": "zb-v",
                                                                   "virtual_stages": 2}])
def test_who_is_said_to_send_is_said_to_receive(parallel: dict[str, Any]) -> None:
    config = tiny_config(parallel=parallel)
    explained = [explain(config, rank) for rank in range(config.parallel.world_size)]
    for it in explained:
        for action in it.program:
            if action.kind.is_communication:
                other = it.axes["pipeline"][it.placement[action.partner.chunk]]
                assert action.partner in explained[other].program and other != it.rank


def test_there_is_no_such_rank() -> None:
    for rank in (-1, 2):
        with pytest.raises(RequestError, match=f"there is no rank {rank}: the job has 2 processes, ranks 0 to 1"):
            explain(tiny_config(parallel={"tensor": 2}), rank)


def test_words_for_a_rank_of_2048() -> None:
    config = resolve_layout(load_config(ROOT / "configs" / "llama-65b.yaml"), 2048)
    text = in_words(explain(config, 777))
    for line in (
            "rank 777 of 2,048: pipeline 3 of 8, data 1 of 32, context 0 of 1, tensor 1 of 8\n",
            "chunk 3 of 8: layers 30 to 39\n",
            "10  layers.*.self_attention.linear_qkv.weight   [8:16, :, :, :]    of  64 × 3 × 128 × 8192\n",
            "layers.*.self_attention.linear_proj.weight  10,485,760  in 10 boxes  [1024:2048, 1024:2048] …\n",
            "parameters        2·n        2,024,079,360 bytes    1.89 GiB\n",
            "gradients         4·n        4,048,158,720 bytes    3.77 GiB\n",
            "masters, moments  12·n / 32    379,514,880 bytes  361.93 MiB\n",
            "activations of at most 5 microbatches, buckets on their way\n",
            "tensor    776 777 778 779 780 781 782 783  parts of the sequence",
            "pipeline  521                              its chunk 2 sends activations to chunk 3",
            "pipeline  1033                             its chunk 4 takes activations from chunk 3",
            "shard     769 777 785 … 1017 (32 ranks)    one state",
            "world     all 2,048",
            "64 microbatches of 1 × 2,048 tokens in the order of 1f1b: 385 actions\n",
            "3RECV_F0  start receiving chunk 3's input from rank 521\n",
            "3SEND_F0  start sending chunk 3's output to rank 1033\n"):
        assert line in text


@pytest.mark.parametrize(("rank", "parallel", "model", "lines"), [
    (0, {}, {}, ["chunk 0 of 1: the embedding, layers 0 to 3, final norm and output layer", "It updates\n  all of it",
                 "moments     8·n", "It works with\n  nobody"]),
    (1, {"data": 4, "zero": 0}, {}, ["gradient  0 1 2 3  the same parameters: gradients are summed once a step"]),
    (2, {"data": 4, "zero": 3, "zero_shard": 2}, {},
     ["parameters  4·n / 2", "gradients   4·n / 2", "moments     8·n / 2", "two units of gathered parameters",
      "shard      2 3    one state: gradients are scattered per microbatch, parameters gathered around each use",
      "replicate  0 2    the same shard: its gradients are summed per microbatch"]),
    (3, {"tensor": 2, "context": 2, "sequence": False}, {},
     ["tensor   2 3    sums over the hidden size", "context  1 3    keys and values, in a ring",
      "shard    1 3    one state"]),
    (3, {"pipeline": 4}, {"tie_embeddings": True},
     ["chunk 3 of 4: layer 3, final norm and output layer", "1  embedding.weight",
      "ends      0      the other end of the tied embedding: its gradient, once a step",
      "pipeline  2      its chunk 2 sends activations to chunk 3"]),
    (1, {"pipeline": 2, "schedule": "zb-v", "virtual_stages": 2}, {},
     ["chunk 1 of 4: layer 1", "chunk 2 of 4: layer 2", "4 microbatches of one chunk",
      "pipeline  0      its chunk 0 sends activations to chunk 1", "pipeline  0      its chunk 3 takes activations",
      "2B0       gradient of chunk 2's input, microbatch 0", "2W0       gradients of chunk 2's weights"]),
])
def test_words_for_other_layouts(rank: int, parallel: dict[str, Any], model: dict[str, Any], lines: list[str]) -> None:
    text = in_words(explain(tiny_config(parallel=parallel, model=model), rank))
    assert [line for line in lines if line not in text] == [], text
