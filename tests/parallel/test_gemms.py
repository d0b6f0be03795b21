"""The products of a linear layer are an object of that layer's own, which may keep state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.distributed.mesh import single_mesh
from engine.kernels.table import PORTABLE
from engine.model.spec import ParamSpec
from engine.parallel.parallelize import ParallelModel, parallelize
from engine.precision.gemms import PlainGemms
from tests.kit.layouts import microbatches, tiny_config
from tests.kit.reference import global_batch

LINEAR_LAYERS = 4 * 4 + 1                          # of TINY: four in each layer, and the output layer


@dataclass
class Watching(PlainGemms):
    """Remembers what was asked, and the largest input so far, as a delayed scaling would."""

    name: str
    asked: list[str] = field(default_factory=list)
    largest: float = 0.0

    def __post_init__(self) -> None:
        super().__init__(PORTABLE)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.asked.append("forward")
        self.largest = max(self.largest, x.abs().max().item())
        return super().forward(x, weight, bias)

    def input_gradient(self, grad_out: Tensor, weight: Tensor) -> Tensor:
        self.asked.append("input")
        return super().input_gradient(grad_out, weight)

    def weight_gradient(self, out: Tensor, grad_out: Tensor, x: Tensor, *, accumulate: bool) -> None:
        self.asked.append("more weight" if accumulate else "weight")
        assert out.dtype == torch.float32 and out.shape == (grad_out.shape[-1], x.shape[-1])
        super().weight_gradient(out, grad_out, x, accumulate=accumulate)


def one_step(make: Callable[[ParamSpec], Any] | None, **parallel: Any) -> tuple[ParallelModel, list[Tensor]]:
    config = tiny_config(parallel=parallel, batch={"global": 2})
    model = parallelize(config, single_mesh(), operations=PORTABLE, gemms=make)
    model.initialise(7)
    model.forward_backward(microbatches(config, global_batch(config, 1), single_mesh()), 1e-2)
    model.finish_reduction()
    return model, [bucket.grad_shard.clone() for bucket in model.buckets]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_every_layer_has_its_own_and_keeps_it(recompute: str) -> None:
    made: list[Watching] = []

    def make(spec: ParamSpec) -> Watching:
        made.append(Watching(spec.name))
        return made[-1]

    _, got = one_step(make, recompute=recompute)
    _, want = one_step(None, recompute=recompute)
    assert len({gemms.name for gemms in made}) == len(made) == LINEAR_LAYERS
    for gemms in made:
        runs = ["forward"] * (2 if recompute == "full" and gemms.name != "output_layer.weight" else 1)
        step = [*runs, "input", "weight", *runs, "input", "more weight"]
        assert gemms.asked == step and gemms.largest > 0, gemms.name
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
