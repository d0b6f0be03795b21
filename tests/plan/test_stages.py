"""The memory model against what an allocator counts: state to the byte, the worst moment of a step within 3 %.

Each case is one rank of its layout in this process; its peers are not there, which changes nothing in what it
allocates.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from engine.config import Config
from engine.config.objectives import OBJECTIVES
from engine.distributed.collectives import DONE
from engine.distributed.mesh import meta_mesh, single_mesh
from engine.distributed.topology import Topology
from engine.kernels.table import PORTABLE
from engine.model import chunks
from engine.optim.adamw import AdamW
from engine.optim.gradients import sum_over_world
from engine.parallel.parallelize import parallelize
from engine.parallel.pipeline import p2p
from engine.parallel.tensor.head import ParallelHead
from engine.plan.explain import describe
from engine.plan.stages import all_stages, stage_memory
from engine.plan.state import stage_state
from tests.kit.fake import fake_rank
from tests.kit.layouts import microbatches, tiny_config
from tests.kit.reference import global_batch

MODEL = {"num_layers": 4, "hidden_size": 128, "num_heads": 8, "num_kv_heads": 8, "ffn_hidden_size": 344,
         "vocab_size": 500, "max_seq_len": 256}
TOLERANCE = 0.03

# name: changes to the layout, which rank, other sections
LAYOUTS: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "one process": ({}, 0, {}),
    "grouped queries": ({}, 0, {"model": {"num_kv_heads": 2}}),
    "selective": ({"recompute": "selective"}, 0, {}),
    "full": ({"recompute": "full"}, 0, {}),
    "full, two layers": ({"recompute": "full", "recompute_layers": 2}, 0, {}),
    "tensor": ({"tensor": 2}, 0, {}),
    "tensor without sequence": ({"tensor": 2, "sequence": False}, 0, {}),
    "tensor, a key each": ({"tensor": 2}, 1, {"model": {"num_kv_heads": 1}}),
    "first of two stages": ({"pipeline": 2}, 0, {}),
    "last of two stages": ({"pipeline": 2}, 1, {}),
    "gpipe": ({"pipeline": 2, "schedule": "gpipe"}, 0, {}),
    "interleaved": ({"pipeline": 2, "schedule": "interleaved", "virtual_stages": 2}, 0, {}),
    "zb-h1": ({"pipeline": 2, "schedule": "zb-h1"}, 1, {}),
    "zb-v": ({"pipeline": 2, "schedule": "zb-v", "virtual_stages": 2}, 0, {}),
    "zero 0": ({"data": 4, "zero": 0}, 0, {}),
    "zero 1": ({"data": 4, "zero": 1}, 0, {}),
    "zero 2": ({"data": 4, "zero": 2}, 0, {}),
    "zero 3": ({"data": 4, "zero": 3}, 0, {}),
    "reproducible": ({"data": 2, "reproducible": True}, 0, {}),
    "reproducible zero 0": ({"data": 4, "zero": 0, "reproducible": True}, 0, {}),
    "reproducible zero 2": ({"data": 2, "zero": 2, "reproducible": True}, 0, {}),
    "context": ({"context": 2}, 0, {}),
    "bf16": ({}, 0, {"precision": {"compute": "bf16"}}),
    "bf16 tensor zero 1": ({"tensor": 2, "data": 2}, 0, {"precision": {"compute": "bf16"}}),
    "gelu": ({}, 0, {"model": {"mlp": "gelu"}}),
    "norms on both sides": ({}, 0, {"model": {"norm_place": "both"}}),
    "norms behind, selective": ({"recompute": "selective", "tensor": 2}, 0, {"model": {"norm_place": "post"}}),
    "document mask": ({}, 0, {"data": {"document_mask": True}}),
}


def config_of(name: str) -> tuple[Config, int]:
    parallel, rank, other = LAYOUTS[name]
    sections = {"model": MODEL, "data": {"seq_len": 128}, "batch": {"micro": 2, "global": 8},
                "kernels": {"linear": "torch", "weight_gradient": "torch"}}
    for section, changes in other.items():
        sections[section] = sections.get(section, {}) | changes
    return tiny_config(parallel=parallel, **sections), rank


def one_step(config: Config, rank: int) -> None:
    """Builds the rank's part and takes a step; what is sent leaves at once."""
    size = config.parallel.world_size
    with fake_rank(rank, size) if size > 1 else nullcontext() as job:
        mesh = single_mesh() if job is None else job.mesh(Topology.of(config))
        model = parallelize(config, mesh)
        model.publish()
        optimizer = AdamW(model.buckets, config.optim, model.operations)
        own = model.forward_backward(microbatches(config, global_batch(config, 1), mesh), 1e-3)
        sum_over_world(own, model.buckets, mesh)
        optimizer.step(1e-3, torch.ones(()), torch.zeros(()))
        model.publish()


def allocated_at_most(config: Config, rank: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """The most bytes that torch's CPU allocator had given out at once, by its own reports."""
    done = SimpleNamespace(wait=DONE.wait, is_completed=lambda: True)
    monkeypatch.setattr(p2p, "dist", SimpleNamespace(isend=lambda *_, **__: done, irecv=lambda *_, **__: done))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        one_step(config, rank)
    events = sorted((event.start_ns(), event.nbytes()) for event in profiler.profiler.kineto_results.events()
                    if event.name() == "[memory]")
    return max(accumulate(nbytes for _, nbytes in events))


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_peak_is_what_the_allocator_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, rank = config_of(name)
    stage = Topology.of(config).coordinates(rank)["pipeline"]
    measured = allocated_at_most(config, rank, monkeypatch)
    assert stage_memory(config, stage, on_gpu=False).total == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize(("name", "ahead"), [
    *((name, True) for name in ("one process", "tensor", "bf16", "zb-h1", "zero 3")),
    *((name, False) for name in ("one process", "tensor", "bf16"))])
def test_the_peak_where_the_loss_comes_in_chunks(name: str, ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ahead:                                          # as of an objective that is no weighted sum
        monkeypatch.setitem(OBJECTIVES, "pretrain", replace(OBJECTIVES["pretrain"], weighted_sum=False))
        monkeypatch.setattr(ParallelHead, "scale", property(lambda self: None, lambda self, value: None), raising=False)
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(chunks, "ROWS", 64)
    config, rank = config_of(name)
    config = config.with_changes(model={"vocab_size": 4000, "num_layers": 2})       # or it would not matter
    stage = Topology.of(config).coordinates(rank)["pipeline"]
    measured = allocated_at_most(config, rank, monkeypatch)
    assert stage_memory(config, stage, on_gpu=False).total == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("parallel", [
    {}, {"zero": 3}, {"data": 4, "zero": 0}, {"data": 4, "zero": 2}, {"data": 4, "zero": 3, "zero_shard": 2},
    {"data": 2, "reproducible": True}, {"tensor": 2, "data": 2}, {"tensor": 2, "context": 2, "sequence": False},
    {"pipeline": 2, "tensor": 2, "schedule": "zb-h1"},
    {"pipeline": 2, "data": 2, "schedule": "zb-v", "virtual_stages": 2, "zero": 2},
    {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 2, "recompute": "full"},
], ids=str)
@pytest.mark.parametrize("others", [
    {}, {"model": {"tie_embeddings": True, "qkv_bias": True, "num_kv_heads": 1}, "precision": {"compute": "bf16"}},
    {"model": {"mlp": "gelu", "mlp_bias": True, "attention_bias": True, "head": "score"}},
    {"adapter": {"rank": 4}, "precision": {"compute": "bf16"}},
    {"precision": {"compute": "bf16", "fp8": "rowwise"}, "model": {"qkv_bias": True}},
    {"precision": {"fp8": "tensorwise", "fp8_skip": ["first"]}, "optim": {"name": "muon"}},
], ids=["fp32", "bf16 tied biased", "gelu score", "adapters", "fp8", "fp8 muon"])
def test_the_state_is_what_a_rank_builds(parallel: dict[str, Any], others: dict[str, Any]) -> None:
    config = tiny_config(parallel=parallel, **others)
    topology = Topology.of(config)
    for stage in range(topology.pipeline):
        mesh = meta_mesh(topology, topology.rank(pipeline=stage))
        assert stage_state(config, stage).bytes == describe(parallelize(config, mesh, operations=PORTABLE), mesh).bytes


def test_what_saves_memory_on_paper() -> None:
    def total(**parallel: Any) -> float:
        return max(stage.total for stage in all_stages(tiny_config(model=MODEL, parallel=parallel,
                                                                   precision={"compute": "bf16"})))

    assert total() > total(recompute="selective") > total(recompute="full")
    assert total(data=4, zero=0) > total(data=4, zero=1) > total(data=4, zero=3)
    assert total(pipeline=2, schedule="gpipe") > total(pipeline=2)
