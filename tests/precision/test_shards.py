"""ZeRO 3 gathers casts in place of weights: half the bytes, and not a bit of difference."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import Config
from engine.distributed.collectives import Work, all_gather_into
from engine.distributed.mesh import Axis
from engine.distributed.topology import Topology
from engine.parallel import parallelize as verbs
from engine.parallel.data import flat, narrow
from engine.parallel.parallelize import ParallelModel, parallelize
from tests.kit.distributed import mesh_for, run_distributed
from tests.kit.layouts import Shards, assemble, microbatches, shards, tiny_config
from tests.kit.reference import global_batch

MODEL = {"num_layers": 3, "hidden_size": 144, "num_heads": 2, "num_kv_heads": 2, "head_dim": 80,   # none whole blocks
         "ffn_hidden_size": 256}


@dataclass
class Seen:
    """What one rank saw of two steps."""

    losses: list[Tensor] = field(default_factory=list)
    gradients: list[Shards] = field(default_factory=list)
    gathered: dict[torch.dtype, int] = field(default_factory=dict)      # bytes, by what travelled


def fp8_config(fp8: str, skip: list[str], **parallel: Any) -> Config:
    return tiny_config(model=MODEL, precision={"fp8": fp8, "compute": "bf16", "fp8_skip": skip},
                       parallel={"zero": 3} | parallel, batch={"global": 8})


def on_a_rank(config: Config, casts: bool) -> Seen:
    """Without `casts` weights travel as they are, and each layer casts what was gathered."""
    mesh, seen = mesh_for(Topology.of(config)), Seen()

    def counting(out: Tensor, x: Tensor, axis: Axis) -> Work:
        seen.gathered[out.dtype] = seen.gathered.get(out.dtype, 0) + out.numel() * out.element_size()
        return all_gather_into(out, x, axis)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flat, "all_gather_into", counting)
        patch.setattr(narrow, "all_gather_into", counting)
        if not casts:
            patch.setattr(verbs, "has_few_scales", lambda block: False)
        model = parallelize(config, mesh, bucket_elements=6000)
        model.initialise(config.run.seed)
        for step in (1, 2):
            batches = microbatches(config, global_batch(config, step), mesh)
            losses = model.forward_backward(batches, 1e-2)
            seen.losses += [] if losses is None else [losses]
            seen.gradients.append(shards(model.buckets, "grad_shard"))
            update(model)
        assert {piece.tensor.dtype for piece in model.weights()} == {torch.bfloat16}
    return seen


def update(model: ParallelModel) -> None:
    with torch.no_grad():
        for bucket in model.buckets:
            bucket.master.sub_(bucket.grad_shard, alpha=0.1)
    model.publish()


@pytest.mark.parametrize(("fp8", "skip", "layout"), [
    ("tensorwise", ["first"], {"tensor": 2, "data": 2}), ("rowwise", ["first", "last"], {"data": 4}),
    ("rowwise", [], {"data": 2, "recompute": "full"}), ("blockwise", [], {"data": 4, "zero_shard": 2}),
    ("rowwise", [], {"data": 2, "pipeline": 2, "schedule": "zb-h1"}),
    ("blockwise", ["last"], {"context": 2, "data": 2, "recompute": "selective"})], ids=str)
def test_gathered_casts_are_the_casts_of_gathered_weights(fp8: str, skip: list[str], layout: dict[str, Any]) -> None:
    config = fp8_config(fp8, skip, **layout)
    size = config.parallel.world_size
    got, want = (run_distributed(on_a_rank, size, config, casts) for casts in (True, False))
    for step in (0, 1):
        gradients, wanted = (assemble(each.gradients[step] for each in ranks) for ranks in (got, want))
        assert all(torch.equal(gradients[name], wanted[name]) for name in wanted)
    for own, wide in zip(got, want, strict=True):
        assert all(map(torch.equal, own.losses, wide.losses))
        narrow_bytes, rest = own.gathered[torch.uint8], own.gathered[torch.bfloat16]
        before = wide.gathered[torch.bfloat16]
        if layout.get("recompute") == "full":                   # two ways to cast, of which a backward pass needs both
            narrow_bytes = narrow_bytes * 2 // 3
        if "pipeline" in layout:                                # a stage's last layer is there still, but the other way
            assert before / 2 < narrow_bytes + rest <= before
        else:
            assert narrow_bytes * 2 + rest == before and narrow_bytes > before / 10
