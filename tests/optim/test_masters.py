"""Weights without masters: bf16 alone, rounded by the same chance in every layout and after every restart."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import Config
from engine.distributed.mesh import single_mesh
from engine.distributed.topology import Topology
from engine.model.parameters import initial_values, take_local
from engine.optim.optimizer import make_optimizer
from engine.parallel.parallelize import parallelize
from tests.kit.fake import fake_rank
from tests.kit.launches import Launches
from tests.kit.layouts import Shards, assemble, shards, tiny_config
from tests.kit.runs import run_config, train, trained

OFF = {"compute": "bf16", "masters": "off"}
MODEL = {"num_kv_heads": 2, "vocab_size": 61, "attention_bias": True, "qk_norm": True}


def written(config: Config, rank: int) -> Shards:
    """What a rank holds after weights that are the same in every layout were written to it."""
    size = config.parallel.world_size
    with fake_rank(rank, size) if size > 1 else nullcontext() as job:
        mesh = single_mesh() if job is None else job.mesh(Topology.of(config))
        model = parallelize(config, mesh, bucket_elements=6000)
        for bucket in model.buckets:
            assert bucket.master.dtype == torch.bfloat16 and bucket.master is bucket.param_shard
            new = bucket.new_moment()
            for entry in bucket.entries:
                bucket.fill(new, entry, take_local(entry.spec, initial_values(entry.spec, 5) + 1e-3))
            bucket.write(new, torch.tensor(False), torch.tensor(4.0))
        return [(name, shape, box, view.float()) for name, shape, box, view in shards(model.buckets, "master")]


def wholes(**parallel: Any) -> dict[str, Tensor]:
    config = tiny_config(model=MODEL, precision=OFF, parallel=parallel)
    return assemble(written(config, rank) for rank in range(config.parallel.world_size))


@pytest.mark.parametrize("layout", [
    {"data": 3, "zero": 3}, {"tensor": 2, "data": 2, "zero": 1}, {"tensor": 4}, {"pipeline": 2, "data": 4, "zero": 2}],
    ids=str)
def test_layouts_round_alike(layout: dict[str, Any]) -> None:
    """Also of a padded vocabulary, and of keys and values that two tensor ranks have copies of."""
    batch = {} if layout != {"data": 3, "zero": 3} else {"global": 6}
    config = tiny_config(model=MODEL, precision=OFF, parallel=layout, **({"batch": batch} if batch else {}))
    got, want = assemble(written(config, rank) for rank in range(config.parallel.world_size)), wholes()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon", "adafactor"])
def test_every_optimizer_does_without_masters(name: str) -> None:
    """A step from the same weights: what it does with masters, each weight up or down to the next number of bf16."""
    after: dict[str, dict[str, Tensor]] = {}
    for masters in ("fp32", "off"):
        config = tiny_config(precision={"compute": "bf16", "masters": masters}, optim={"name": name})
        model = parallelize(config, single_mesh())
        model.initialise(1)
        optimizer = make_optimizer(model.buckets, config.optim, model.operations)
        assert all(moment.dtype == torch.float32 for moment in optimizer.state())
        for bucket in model.buckets:
            bucket.master.copy_(bucket.master.bfloat16())
            bucket.grad_shard.copy_(bucket.master.float().sin())
        optimizer.step(1e-3, torch.ones(()), torch.zeros(()))
        with Launches() as publishing:
            model.publish()
        if name == "adamw" or masters == "off":                    # the update has written them
            assert "aten::copy_" not in publishing.kernels
        after[masters] = assemble([shards(model.buckets, "master")])
        assert all(torch.equal(bucket.param_buffer, bucket.master.bfloat16()) for bucket in model.buckets)
    for key, want in after["fp32"].items():
        got = after["off"][key]
        assert ((got - want).abs() <= want.abs() * 2.0**-7 + 1e-30).all() and not torch.equal(got, want.bfloat16())


def state(ranks: list[Shards]) -> dict[str, Tensor]:
    return assemble([(name, shape, box, values.float()) for name, shape, box, values in each] for each in ranks)


def test_a_run_resumes_and_is_reproduced_bit_for_bit(tmp_path: Path) -> None:
    def run(folder: str, **parallel: Any) -> Config:
        return run_config(tmp_path, folder, precision=OFF, parallel={"reproducible": True} | parallel)

    whole, resumed, other = run("whole"), run("resumed", data=2, zero=3), run("other", data=2, zero=1)
    want = state(train(whole))
    train(resumed, crash_after=3)
    for got in (state(train(resumed)), state(train(other))):
        assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    assert trained(resumed) == trained(other) == trained(whole)
    with_masters = run_config(tmp_path, "resumed", precision={"compute": "bf16"}, parallel={"reproducible": True},
                              steps=8)
    with pytest.raises(AssertionError, match=r"CheckpointError: .* is torch.bfloat16 .*leave precision\.masters as"):
        train(with_masters)
