"""The comparison with one process notices what can go wrong: each test breaks the engine in one place.

The mistakes are those that a loss curve hides: all of them leave the first loss exactly right.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

import engine.parallel.context.ring as ring
import engine.parallel.parallelize as parallelize
import engine.parallel.pipeline.executor as executor
from engine.config import Config
from engine.distributed.mesh import Axis
from engine.parallel.data import buckets
from tests.kit.distributed import run_distributed
from tests.kit.layouts import TOLERANCE, Result, check, differences, reference, tiny_config, train_layout

NUM_STEPS = 2
all_reduce, start_ring_shift = buckets.all_reduce, ring.start_ring_shift


def drop_tensor_sum(x: Tensor, axis: Axis, **options: Any) -> Any:
    """Norms under sequence parallelism: every tensor rank sees a part of the tokens."""
    return buckets.DONE if axis.name == "tensor" else all_reduce(x, axis, **options)


def drop_replicas_sum(x: Tensor, axis: Axis, **options: Any) -> Any:
    return buckets.DONE if axis.name == "replicate" else all_reduce(x, axis, **options)


def drop_tied_sum(x: Tensor, axis: Axis, **options: Any) -> Any:
    """Embedding and output layer, on two stages, go their own ways."""
    return buckets.DONE if axis.name == "ends" else all_reduce(x, axis, **options)


class OwnMean(executor.Executor):
    """Scales by the tokens of this rank's microbatches instead of the whole batch's."""

    def run(self, program: Any, batches: Any, objective: Any, scale: Any) -> Any:
        own = sum(int(batch.loss_mask_SB.sum()) for batch in batches)
        return super().run(program, batches, objective, 1 / (own * 2))


def keep_key_gradients(x: Tensor, axis: Axis, tag: int = 0) -> ring.RingShift:
    """The gradients of keys and values do not go round with them."""
    return ring.RingShift(x, []) if tag else start_ring_shift(x, axis)


# What is broken, by what, in which layout, and what must be noticed.
MUTATIONS: dict[str, tuple[Any, str, Any, dict[str, Any], str]] = {
    "norm gradients not summed over tensor ranks": (
        buckets, "all_reduce", drop_tensor_sum, {"parallel": {"tensor": 2}}, "replicas of"),
    "norms inside a region not summed over tensor ranks": (
        buckets, "all_reduce", drop_tensor_sum,
        {"parallel": {"tensor": 2, "sequence": False}, "model": {"qk_norm": True}}, "k_layernorm.weight"),
    "tied embeddings not summed over stages": (
        buckets, "all_reduce", drop_tied_sum,
        {"parallel": {"pipeline": 2}, "model": {"tie_embeddings": True}}, "replicas of embedding.weight"),
    "scale of this rank's tokens": (
        parallelize, "Executor", OwnMean,
        {"parallel": {"data": 2}, "data": {"document_mask": True}}, "grad_norms"),
    "copies of shards not summed": (
        buckets, "all_reduce", drop_replicas_sum, {"parallel": {"data": 4, "zero_shard": 2}}, "replicas of"),
    "ring attention's gradients stay on the wrong rank": (
        ring, "start_ring_shift", keep_key_gradients, {"parallel": {"context": 2}},
        "gradients of layers.3.self_attention.linear_qkv.weight"),
}


def train_broken(config: Config, name: str) -> Result:
    owner, attribute, broken, _, _ = MUTATIONS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, attribute, broken)
        return train_layout(config, NUM_STEPS)


@pytest.mark.parametrize("name", MUTATIONS)
def test_notices(name: str) -> None:
    *_, sections, noticed = MUTATIONS[name]
    config = tiny_config(**sections)
    want = reference(config, NUM_STEPS)
    check(run_distributed(train_layout, config.parallel.world_size, config, NUM_STEPS), want)
    broken = run_distributed(train_broken, config.parallel.world_size, config, name)
    assert broken[0].losses[0] == pytest.approx(want.losses[0], rel=TOLERANCE)
    found = differences(broken, want)
    assert any(noticed in difference for difference in found), found
