"""Optimizers besides AdamW: every layout is one process with torch's SGD or Adafactor, or Muon by its definition."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from engine.checkpoint.resume import find_latest
from engine.config import Config, OptimConfig
from engine.distributed.mesh import single_mesh
from engine.optim.muon import orthogonal
from engine.optim.optimizer import make_optimizer
from engine.parallel.parallelize import parallelize
from engine.plan.explain import state_bytes
from engine.plan.state import stage_state
from tests.kit.distributed import run_distributed
from tests.kit.layouts import check, tiny_config, train_layout
from tests.kit.reference import train_reference
from tests.kit.runs import run_config, train, trained

LAYOUTS: list[dict[str, Any]] = [
    {}, {"tensor": 2, "data": 2, "zero": 1}, {"tensor": 2, "sequence": False, "data": 2, "zero": 3},
    {"pipeline": 2, "data": 2, "zero": 2}, {"data": 4, "zero": 1, "zero_shard": 2}, {"tensor": 4}]
# What an optimizer of whole matrices meets besides: a tied embedding with its copy on another stage, a padded
# vocabulary, biases, ranks whose shard has nothing of a matrix.
WITH_EVERYTHING = {"tie_embeddings": True, "vocab_size": 61, "attention_bias": True, "mlp_bias": True, "qk_norm": True}
PRECISIONS = [{"compute": "fp32"}, {"compute": "bf16"}, {"compute": "bf16", "masters": "off"}]
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.1}, "sgd, momentum 0.5": {"name": "sgd", "lr": 0.1, "momentum": 0.5},
    "adafactor": {"name": "adafactor", "lr": 0.1}, "adafactor, momentum 0.9": {"name": "adafactor", "lr": 0.1,
                                                                               "momentum": 0.9},
    "muon": {"name": "muon"}, "muon, momentum 0.8": {"name": "muon", "momentum": 0.8}}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout.items())))
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_layout_is_one_process(name: str, layout: dict[str, Any]) -> None:
    groups = 1 if name == "adafactor, momentum 0.9" else 2          # of one both tensor ranks have copies
    config = tiny_config(parallel=layout, optim=OPTIMIZERS[name], model={"num_kv_heads": groups})
    check(run_distributed(train_layout, config.parallel.world_size, config, 3), train_reference(config, 3))


@pytest.mark.parametrize("layout", [
    {"pipeline": 2, "tensor": 2, "data": 2, "zero": 1}, {"tensor": 4, "zero": 0}, {"data": 4, "zero": 3},
], ids=lambda layout: "-".join(map(str, layout.items())))
@pytest.mark.parametrize("momentum", [None, 0.5])
def test_adafactor_of_all_there_is(layout: dict[str, Any], momentum: float | None) -> None:
    """One step: a bias with a small gradient gets no smaller an update, so rounding grows from step to step."""
    config = tiny_config(parallel=layout, model=WITH_EVERYTHING,
                         optim={"name": "adafactor", "lr": 0.1, "momentum": momentum})
    check(run_distributed(train_layout, config.parallel.world_size, config, 1), train_reference(config, 1))


def test_muon_is_torchs_up_to_its_bf16() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((24, 40), (40, 24), (16, 16)):
        weight = torch.nn.Parameter(torch.zeros(shape))
        theirs = torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        weight.grad = torch.randn(shape, generator=generator)
        theirs.step()
        ours = -0.2 * max(shape) ** 0.5 * orthogonal(weight.grad, torch.float32)
        assert (ours - weight.detach()).norm() < 0.03 * ours.norm()


@pytest.mark.parametrize("name", ["adamw", *OPTIMIZERS])
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_a_step_that_is_not_finite_changes_nothing(name: str, precision: dict[str, str]) -> None:
    config = tiny_config(optim=OPTIMIZERS.get(name, {}), precision=precision)
    model = parallelize(config, single_mesh())
    model.initialise(1)
    optimizer = make_optimizer(model.buckets, config.optim, model.operations)
    for bucket in model.buckets:
        bucket.grad_shard.fill_(float("nan"))
    tensors = [*(bucket.master for bucket in model.buckets), *optimizer.steps, *optimizer.state()]
    before = [tensor.clone() for tensor in tensors]
    optimizer.step(0.1, torch.ones(()), torch.ones(()))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert optimizer.num_steps() == 0


@pytest.mark.parametrize("name", ["adamw", *OPTIMIZERS])
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_the_plan_knows_what_it_keeps(name: str, precision: dict[str, str]) -> None:
    config = tiny_config(optim=OPTIMIZERS.get(name, {}), precision=precision)
    model = parallelize(config, single_mesh())
    optimizer = make_optimizer(model.buckets, config.optim, model.operations)
    assert stage_state(config, 0).bytes == state_bytes(model.buckets, optimizer)


@pytest.mark.parametrize("name", ["adafactor, momentum 0.9", "muon"])
def test_a_run_goes_on_in_another_layout(tmp_path: Path, name: str) -> None:
    """In its own bit for bit, with everything the optimizer keeps."""
    def run(folder: str, steps: int, **parallel: Any) -> Config:
        optim = OPTIMIZERS[name] | {"decay": "constant"}
        model = {"num_kv_heads": 1}                        # of which both tensor ranks hold copies
        return run_config(tmp_path, folder, steps=steps, parallel=parallel, optim=optim, checkpoint={"every": 2},
                          model=model, eval={"every": 0})

    cut = {"tensor": 2, "data": 2, "zero": 1}
    runs = [run("alone", 4), run("whole", 4, **cut)]
    train(runs[0]), train(runs[1])
    for folder, after in (("same", cut), ("other", {"data": 2, "zero": 3})):
        train(run(folder, 2, **cut))
        runs.append(run(folder, 4, **after))
        train(runs[-1])
    alone, whole, same, other = ([row[:3] for row in trained(each)] for each in runs)
    assert same == whole
    for each in runs[1:]:                                  # copies are stored once
        reader, _ = find_latest(Path(each.run.dir) / "checkpoints")
        assert reader is not None
        assert all(sum(box.num_elements for box in reader.boxes(key)) == prod(reader.global_shape(key))
                   for key in reader.keys())
    assert np.allclose(whole, alone, rtol=1e-5, atol=0) and np.allclose(other, alone, rtol=1e-5, atol=0)


def test_adafactor_depends_on_its_shards() -> None:
    with pytest.raises(ValidationError, match=r"optim\.name adafactor sums over rows and columns shard by shard"):
        tiny_config(optim={"name": "adafactor"}, parallel={"reproducible": True})


def test_momentum_is_of_those_that_have_it() -> None:
    with pytest.raises(ValidationError, match=r"momentum\(0.5\) is of sgd, muon and adafactor; adamw has betas"):
        OptimConfig(momentum=0.5)
    with pytest.raises(ValidationError, match="there is no optimizer 'moun'; did you mean `muon`"):
        OptimConfig.model_validate({"name": "moun"})
