"""Bytes per rank, measured on the storages that exist, against the ZeRO formulas.

With N ranks that share the state, per parameter of the rank (whose number is the model's over tensor × pipeline):

    level   parameters    gradients     AdamW                 bf16 compute   fp32 compute
    0       c             4             8 + m                 18             16
    1       c             4             (8 + m) / N           6 + 12/N       8 + 8/N
    2       c             4/N           (8 + m) / N           2 + 16/N       4 + 12/N
    3       c/N           4/N           (8 + m) / N           18/N           16/N

c is 2 for bf16, with m = 4 for the fp32 master, or 4 for fp32, where parameter and master are one (m = 0).  The paper
counts 2 + 2 + 12: its gradients are fp16, ours are accumulated in fp32.  Buffers that come and go are counted apart.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import Config
from engine.optim.gradients import sum_over_world
from engine.parallel.data import buckets
from engine.parallel.data.buckets import Bucket
from tests.kit.distributed import run_distributed
from tests.kit.layouts import microbatches, tiny_config
from tests.kit.recording import build
from tests.kit.reference import global_batch

MODEL = {"num_layers": 4, "hidden_size": 128, "num_heads": 4, "ffn_hidden_size": 384, "vocab_size": 512}
BUCKET_ELEMENTS = 200_000


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind the tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().size() for t in tensors}
    return sum(storages.values())


def living() -> int:
    """Bytes of all tensors that Python knows in this process."""
    gc.collect()
    return storage_bytes(t for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter))


def measure(config: Config) -> dict[str, int]:
    """Runs on one rank: bytes between two steps, and the most that came and went during the second."""
    before = living()
    model, optimizer, mesh = build(config, BUCKET_ELEMENTS)
    batches = microbatches(config, global_batch(config, 1), mesh)
    whole = [(b.grad_buffer, b.param_buffer) for b in model.buckets]
    peaks = {"gradients": 0, "parameters": 0}

    def note() -> None:
        for name, column in (("gradients", 0), ("parameters", 1)):
            peaks[name] = max(peaks[name], storage_bytes(pair[column] for pair in whole))

    with pytest.MonkeyPatch.context() as patch:
        original = buckets.allocate
        patch.setattr(buckets, "allocate", lambda buffer: (original(buffer), note()))
        note()
        losses = model.forward_backward(batches, 1e-3)
    sum_over_world(losses, model.buckets, mesh)
    optimizer.step(1e-3, torch.ones(()), torch.zeros(()))
    model.publish()
    del batches, losses
    everything = living() - before
    state = [*optimizer.exp_avg, *optimizer.exp_avg_sq, *(b.master for b in model.buckets
                                                          if b.master.dtype != b.param_shard.dtype)]
    return {
        "elements": sum(e.parameter.numel() for b in model.buckets for e in b.entries),
        "parameters": storage_bytes(t for b in model.buckets for t in (b.param_buffer, b.param_shard)),
        "gradients": storage_bytes(t for b in model.buckets for t in (b.grad_buffer, b.grad_shard)),
        "state": storage_bytes(state),
        "all": everything,
        "peak gradients": peaks["gradients"], "peak parameters": peaks["parameters"],
        "largest bucket": max(b.grad_buffer.numel() for b in model.buckets),
        "two units": two_largest_units(model.buckets),
    }


def two_largest_units(all_buckets: Iterable[Bucket]) -> int:
    """Elements of the two largest units of ZeRO 3: embedding, a layer, final norm and output layer."""
    units: dict[str, int] = {}
    for bucket in all_buckets:
        name = bucket.entries[0].spec.name.replace("final_layernorm", "output_layer")
        unit = ".".join(name.split(".")[:2]) if name.startswith("layers") else name
        units[unit] = units.get(unit, 0) + bucket.param_buffer.numel()
    return sum(sorted(units.values())[-2:])


def measured(compute: str, level: int, **parallel: Any) -> list[dict[str, int]]:
    config = tiny_config(model=MODEL, precision={"compute": compute}, parallel=parallel | {"zero": level},
                         batch={"global": 8})
    return run_distributed(measure, config.parallel.world_size, config)


@pytest.mark.parametrize("compute, parallel, ranks, levels", [
    ("fp32", {"data": 4}, 4, (0, 1, 2, 3)), ("bf16", {"data": 4}, 4, (0, 1, 2, 3)),
    ("bf16", {"data": 4, "zero_shard": 2}, 2, (1, 2, 3)), ("bf16", {"data": 2, "context": 2}, 4, (3,)),
    ("bf16", {"tensor": 2, "data": 2}, 2, (1, 3)),
], ids=["fp32-data4", "bf16-data4", "bf16-data4-shard2", "bf16-data2-context2", "bf16-tensor2-data2"])
def test_bytes_per_rank(compute: str, parallel: dict[str, int], ranks: int, levels: tuple[int, ...]) -> None:
    width, master = {"fp32": (4, 0), "bf16": (2, 4)}[compute]
    for level, rank in [(each, rank) for each in levels for rank in measured(compute, each, **parallel)]:
        own = rank["elements"]
        assert rank["parameters"] == pytest.approx(own * width / (ranks if level >= 3 else 1), rel=0.02)
        assert rank["gradients"] == pytest.approx(own * 4 / (ranks if level >= 2 else 1), rel=0.02)
        assert rank["state"] == pytest.approx(own * (8 + master) / (ranks if level >= 1 else 1), rel=0.02)
        # Of all tensors that are alive between two steps these are all but the scalars.
        assert rank["all"] == pytest.approx(rank["parameters"] + rank["gradients"] + rank["state"], rel=0.001)


def test_pipeline_divides_what_it_deals() -> None:
    ranks = measured("bf16", 1, pipeline=4)
    assert sum(rank["elements"] for rank in ranks) == measured("bf16", 1)[0]["elements"]
    for rank in ranks:
        assert rank["all"] == pytest.approx(18 * rank["elements"], rel=0.02)


@pytest.mark.parametrize("level, schedule", [(2, "1f1b"), (3, "zb-h1")])
def test_whole_gradients_come_and_go(level: int, schedule: str) -> None:
    """At once: two buckets that are being reduced and those that fill, one of each kind (matrices, norms)."""
    for rank in measured("bf16", level, data=4, schedule=schedule):
        assert 0 < rank["peak gradients"] <= 4 * 3.1 * rank["largest bucket"]
        assert rank["peak gradients"] < 0.8 * 4 * rank["elements"]


def test_zero_3_holds_two_units() -> None:
    for rank in measured("bf16", 3, data=4):
        assert rank["peak parameters"] == 2 * rank["two units"]
        assert rank["peak parameters"] < 2 * rank["elements"] * 0.7
