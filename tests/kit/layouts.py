"""Running a layout on real processes and putting its shards together again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import Config, resolve_layout
from engine.distributed.boxes import Box
from engine.distributed.mesh import Mesh
from engine.distributed.topology import Topology
from engine.kernels.fp8 import widened
from engine.model.context import Batch
from engine.model.parameters import take_local
from engine.optim.gradients import clip_divisor, sum_over_world
from engine.optim.optimizer import make_optimizer
from engine.optim.schedule import learning_rate
from engine.parallel.context.zigzag import context_part
from engine.parallel.data.buckets import Bucket
from engine.parallel.data.narrow import NarrowBucket
from engine.parallel.parallelize import ParallelModel, parallelize
from tests.kit.compare import relative_error
from tests.kit.distributed import mesh_for, run_distributed
from tests.kit.reference import PRETRAINING, Reference, Task, adapter_values, train_reference

TOLERANCE = 1e-5

Shards = list[tuple[str, tuple[int, ...], Box, Tensor]]
Share = Callable[[Config, Batch, Mesh], Sequence[Batch]]

TINY = {
    "run": {"seed": 7},
    "model": {"num_layers": 4, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 4, "ffn_hidden_size": 64,
              "vocab_size": 97, "max_seq_len": 64},
    "precision": {"compute": "fp32"},
    "data": {"seq_len": 16},
    "batch": {"micro": 1, "global": 8},
    "steps": 10,
    # Adam turns rounding into sign flips where a gradient is near zero; a large eps keeps the comparison meaningful.
    "optim": {"lr": 1e-2, "warmup_steps": 2, "eps": 1e-2, "weight_decay": 0.1, "grad_clip": 0.5},
}


def tiny_config(**sections: dict[str, Any]) -> Config:
    """`TINY` with some keys changed, resolved for the number of ranks its degrees ask for."""
    values = {k: dict(v) if isinstance(v, dict) else v for k, v in TINY.items()}
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    parallel = {"data": 1} | values.get("parallel", {})
    config = Config.model_validate(values | {"parallel": parallel})
    return resolve_layout(config, config.parallel.world_size)


@dataclass
class Result:
    """What one rank saw."""

    losses: list[float] = field(default_factory=list)
    totals: list[list[float]] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    gradients: Shards = field(default_factory=list)
    weights: Shards = field(default_factory=list)
    initial: Shards = field(default_factory=list)
    parameters_equal_masters: bool = True


def microbatches(config: Config, batch: Batch, mesh: Mesh) -> list[Batch]:
    """This rank's share of a global batch."""
    rows = batch.tokens_SB.shape[1] // config.batch.global_ * config.batch.micro
    return [context_part(batch.rows((m * config.parallel.data_size + mesh.data.index) * rows, rows), mesh.context)
            for m in range(config.num_microbatches)]


def shards(buckets: Iterable[Bucket], which: str) -> Shards:
    return [(spec.name, spec.shape, box, view.clone()) for bucket in buckets
            for spec, box, view in bucket.boxes(getattr(bucket, which))]


def train_layout(config: Config, num_steps: int, task: Task = PRETRAINING, share: Share = microbatches) -> Result:
    """Runs on one rank: `num_steps` steps in the layout of `config`; `share` is what a rank gets of a global batch."""
    mesh = mesh_for(Topology.of(config))
    model = parallelize(config, mesh, objective=task.objective, bucket_elements=6000)
    model.initialise(config.run.seed)
    for bucket in model.buckets:
        for entry in bucket.entries:
            if (values := adapter_values(entry.spec)) is not None:
                bucket.set_master(entry, take_local(entry.spec, values))
    model.publish()
    optimizer = make_optimizer(model.buckets, config.optim, model.operations)
    out = Result(initial=shards(model.buckets, "master"))
    for step in range(1, num_steps + 1):
        batch = task.batch(config, step)
        scale = 1 / task.divisor(batch)
        own = model.forward_backward(share(config, batch, mesh), scale)
        sums = sum_over_world(own, model.buckets, mesh, num_sums=len(task.objective.sums),
                              reproducible=config.parallel.reproducible)
        if step == 1:
            out.gradients = shards(model.buckets, "grad_shard")
        optimizer.step(learning_rate(step, config.steps, config.optim),
                       clip_divisor(sums.grad_norm, config.optim.grad_clip), torch.zeros(()))
        model.publish()
        out.totals.append(sums.sums.tolist())
        out.losses.append(out.totals[-1][0] * scale)
        out.grad_norms.append(sums.grad_norm.item())
    out.weights = shards(model.buckets, "master")
    out.parameters_equal_masters = parameters_match(model)
    return out


def parameters_match(model: ParallelModel) -> bool:
    """Whether the parameters used by the layers are the updated masters; of those that are cast, the casts."""
    for bucket in model.buckets:
        bucket.start_gather()
        bucket.wait_gather()
    return all(_are_cast(bucket) if isinstance(bucket, NarrowBucket) else
               torch.equal(bucket.param_buffer[bucket.shard].float(), bucket.master) for bucket in model.buckets)


def _are_cast(bucket: NarrowBucket) -> bool:
    """Within a sixteenth, the smallest numbers of all left out."""
    whole = torch.zeros_like(bucket.param_buffer, dtype=torch.float32)
    for entry, gemms in zip(bucket.entries, bucket.gemms, strict=True):
        assert gemms.gathered is not None
        cast = widened(gemms.gathered[0])
        whole[entry.offset : entry.offset + cast.numel()] = cast.flatten()
    return torch.allclose(whole[bucket.shard], bucket.master, rtol=1 / 16, atol=1e-4)


def assemble(parts: Iterable[Shards]) -> dict[str, Tensor]:
    """Global tensors from everybody's shards; every element must be there, and replicas must agree exactly."""
    whole: dict[str, Tensor] = {}
    for name, shape, box, values in (item for part in parts for item in part):
        target = whole.setdefault(name, torch.full(shape, float("nan")))
        there = target[box.slices]
        known = ~there.isnan()
        assert torch.equal(there[known], values[known]), f"replicas of {name} at {box} differ"
        target[box.slices] = values
    for name, values in whole.items():
        assert not values.isnan().any(), f"{name}: {int(values.isnan().sum())} elements on no rank"
    return whole


def run_layout(config: Config, num_steps: int, task: Task = PRETRAINING, share: Share = microbatches) -> list[Result]:
    return run_distributed(train_layout, config.parallel.world_size, config, num_steps, task, share)


@cache
def _reference(what: str, num_steps: int, task: Task) -> Reference:
    return train_reference(Config.model_validate_json(what), num_steps, task)


def reference(config: Config, num_steps: int, task: Task = PRETRAINING) -> Reference:
    """One process, the whole batch at once.  It depends on what is trained, never on the layout, and is kept."""
    adapter = {} if config.adapter is None else {"adapter": config.adapter.model_dump()}
    trained = tiny_config(model=config.model.model_dump(), data=config.data.model_dump(),
                          batch={"micro": 1, "global": config.batch.global_}, **adapter)
    return _reference(trained.model_dump_json(by_alias=True), num_steps, task)


def differences(results: Sequence[Result], want: Reference, cancelled: float = 0.0) -> list[str]:
    """Where the ranks saw something else than one process: initial weights bit for bit, the rest within `TOLERANCE`.

    `cancelled`: the size of what cancels in sums that are logged, such as the log-probability of a text in its
    difference from a reference; fp32 cannot know such a sum better.  The loss has no such allowance.
    """
    found = []
    for rank, result in enumerate(results):
        if not result.parameters_equal_masters:
            found.append(f"rank {rank}: parameters are not the masters")
        for what in ("losses", "grad_norms"):
            got, wanted = getattr(result, what), getattr(want, what)
            if got != pytest.approx(wanted, rel=TOLERANCE):
                found.append(f"rank {rank}: {what} {got}, not {wanted}")
        for step, (got, wanted) in enumerate(zip(result.totals, want.totals, strict=True), 1):
            if got != pytest.approx(wanted, rel=TOLERANCE, abs=TOLERANCE * cancelled):
                found.append(f"rank {rank}: sums of step {step} {got}, not {wanted}")
    for what in ("initial", "gradients", "weights"):
        wanted, tolerance = getattr(want, what), 0.0 if what == "initial" else TOLERANCE
        try:
            got = assemble(getattr(result, what) for result in results)
        except AssertionError as error:
            found.append(f"{what}: {error}")
            continue
        if got.keys() != wanted.keys():
            found.append(f"{what}: parameters {sorted(got.keys() ^ wanted.keys())} are missing or too many")
        for name in got.keys() & wanted.keys():
            relative = relative_error(got[name], wanted[name])
            if not relative <= tolerance:      # NaN too
                found.append(f"{what} of {name}: relative error {relative:.2e}")
    return found


def check(results: Sequence[Result], want: Reference, cancelled: float = 0.0) -> None:
    """Fails where the ranks saw something else than one process did; see `differences`."""
    found = differences(results, want, cancelled)
    assert not found, "\n".join(found)
