"""Optimizers besides AdamW: every layout is one process with torch's SGD, or with Muon by its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from engine.config import OptimConfig
from engine.distributed.mesh import single_mesh
from engine.optim.muon import orthogonal
from engine.optim.optimizer import make_optimizer
from engine.parallel.parallelize import parallelize
from engine.plan.explain import state_bytes
from engine.plan.state import stage_state
from tests.kit.distributed import run_distributed
from tests.kit.layouts import check, tiny_config, train_layout
from tests.kit.reference import train_reference

LAYOUTS: list[dict[str, Any]] = [
    {}, {"tensor": 2, "data": 2, "zero": 1}, {"tensor": 2, "sequence": False, "data": 2, "zero": 3},
    {"pipeline": 2, "data": 2, "zero": 2}, {"data": 4, "zero": 1, "zero_shard": 2}]
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.1}, "sgd, momentum 0.5": {"name": "sgd", "lr": 0.1, "momentum": 0.5},
    "muon": {"name": "muon"}, "muon, momentum 0.8": {"name": "muon", "momentum": 0.8}}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout.items())))
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_layout_is_one_process(name: str, layout: dict[str, Any]) -> None:
    config = tiny_config(parallel=layout, optim=OPTIMIZERS[name], model={"num_kv_heads": 2})
    check(run_distributed(train_layout, config.parallel.world_size, config, 3), train_reference(config, 3))


def test_muon_is_torchs_up_to_its_bf16() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((24, 40), (40, 24), (16, 16)):
        weight = torch.nn.Parameter(torch.zeros(shape))
        theirs = torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        weight.grad = torch.randn(shape, generator=generator)
        theirs.step()
        ours = -0.2 * max(shape) ** 0.5 * orthogonal(weight.grad, torch.float32)
        assert (ours - weight.detach()).norm() < 0.03 * ours.norm()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_is_not_finite_changes_nothing(name: str) -> None:
    config = tiny_config(optim=OPTIMIZERS[name])
    model = parallelize(config, single_mesh())
    model.initialise(1)
    optimizer = make_optimizer(model.buckets, config.optim, model.operations)
    for bucket in model.buckets:
        bucket.grad_shard.fill_(float("nan"))
    tensors = [*(bucket.master for bucket in model.buckets), *optimizer.steps,
               *(moment for of_bucket in optimizer.moments.values() for moment in of_bucket.values())]
    before = [tensor.clone() for tensor in tensors]
    optimizer.step(0.1, torch.ones(()), torch.ones(()))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert optimizer.num_steps() == 0


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_the_plan_knows_what_it_keeps(name: str, compute: str) -> None:
    config = tiny_config(optim={"name": name}, precision={"compute": compute})
    model = parallelize(config, single_mesh())
    optimizer = make_optimizer(model.buckets, config.optim, model.operations)
    assert stage_state(config, 0).bytes == state_bytes(model.buckets, optimizer)


def test_momentum_is_of_those_that_have_it() -> None:
    with pytest.raises(ValidationError, match=r"momentum\(0.5\) is of sgd and muon; adamw has betas"):
        OptimConfig(momentum=0.5)
    with pytest.raises(ValidationError, match="there is no optimizer 'moun'; did you mean `muon`"):
        OptimConfig.model_validate({"name": "moun"})
