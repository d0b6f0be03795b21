"""What is summed up over tokens reaches the fp32 accumulators without having been rounded to the layers' dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.distributed.arithmetic import arithmetic
from engine.distributed.mesh import single_mesh
from engine.kernels.rms_norm import add_rms_norm
from engine.model.layers import ScoreHead
from engine.parallel.gradients import GradSlot, attach_slot
from engine.parallel.parallelize import parallelize
from engine.parallel.tensor.layers import sum_over_tokens
from tests.kit.compare import random
from tests.kit.layouts import microbatches, tiny_config
from tests.kit.reference import global_batch


def gradients(**sections: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Of one step of a model with everything a layer can have."""
    config = tiny_config(model={"qkv_bias": True, "tie_embeddings": True}, data={"document_mask": True}, **sections)
    model = parallelize(config, single_mesh(), bucket_elements=6000)
    model.initialise(7)
    model.forward_backward(microbatches(config, global_batch(config, 1), single_mesh()), 1e-2)
    model.finish_reduction()
    for bucket in model.buckets:
        for spec, _, view in bucket.boxes(bucket.grad_shard):
            yield spec.name, view.clone()


def test_no_gradient_of_a_bf16_layer_was_rounded_to_bf16() -> None:
    """Sums of a few bf16 numbers may fit by chance; all of them do only where they were rounded."""
    for name, gradient in gradients(precision={"compute": "bf16"}):
        assert gradient.dtype == torch.float32
        held = gradient[gradient != 0]
        fitting = (held == held.bfloat16().float()).float().mean().item()
        assert fitting < 0.2, f"{name}: {fitting:.0%} fit into bf16"


def slot_for(parameter: torch.nn.Parameter) -> Tensor:
    """The accumulator that the parameter's gradients go to from now on."""
    view = torch.zeros(parameter.shape)
    attach_slot(parameter, GradSlot(view, lambda: None, lambda: None))
    return view


@pytest.mark.parametrize("what", ["norm", "bias", "score"])
def test_sums_over_tokens_are_as_good_as_in_fp32(what: str) -> None:
    x, upstream = random(4096, 64, seed=1, dtype=torch.bfloat16), random(4096, 64, seed=2, dtype=torch.bfloat16)
    parameter = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    if what == "norm":
        sums = slot_for(parameter)
        add_rms_norm(x, None, parameter, 1e-6)[1].backward(upstream)
        wide = x.double()
        want = (upstream.double() * wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).sum(0)
    elif what == "score":
        head = ScoreHead(torch.nn.Parameter(random(1, 64, seed=3))).bfloat16()
        sums = slot_for(head.weight)
        head(x).backward(upstream[:, 0].float())
        sums, want = sums[0], (upstream[:, :1].double() * x.double()).sum(0)
    else:
        sums, want = sum_over_tokens(upstream), upstream.double().sum(0)
    assert sums.dtype == torch.float32
    assert (sums - want).norm() < 1e-6 * want.norm()


def test_deterministic_algorithms_exist_for_all_of_a_step_and_change_no_bit_of_it() -> None:
    plain = list(gradients())
    with arithmetic(deterministic=True):
        ordered = list(gradients())
    for (name, a), (_, b) in zip(plain, ordered, strict=True):
        assert torch.equal(a, b), name
