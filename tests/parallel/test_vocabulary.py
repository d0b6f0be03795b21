"""The loss without the logits: in chunks the same as at once, in every kind of layout, and no larger than a chunk."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from engine.config import Config
from engine.distributed.mesh import single_mesh
from engine.model import chunks
from engine.model.chunks import ROWS, rows_of_chunk
from engine.model.objective import NextToken
from engine.parallel.parallelize import parallelize
from engine.parallel.tensor.vocabulary import per_token, weighted_sum
from tests.kit.distributed import run_distributed
from tests.kit.layouts import Result, check, microbatches, reference, tiny_config, train_layout
from tests.kit.reference import PRETRAINING, Task, global_batch
from tests.parallel.test_objectives import TASKS

MODEL = {"tie_embeddings": True, "vocab_size": 61}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {}, "reproducible": {"data": 2, "reproducible": True},
    "tensor × zero 3": {"tensor": 2, "data": 2, "zero": 3},
    "tensor without sequence": {"tensor": 2, "sequence": False}, "context × pipeline": {"context": 2, "pipeline": 2},
    "gpipe": {"pipeline": 2, "schedule": "gpipe"},
    "zb-v × zero 2": {"pipeline": 2, "data": 2, "schedule": "zb-v", "virtual_stages": 2, "zero": 2},
}


def in_small_chunks(config: Config, num_steps: int, task: Task) -> Result:
    """Runs on one rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_ELEMENTS", 1)
        patch.setattr(chunks, "ROWS", 3)
        return train_layout(config, num_steps, task)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("task", [PRETRAINING, TASKS["preference"][0]], ids=["weighted sum", "log-probabilities"])
def test_every_layout_learns_the_same_in_chunks(name: str, task: Task) -> None:
    config = tiny_config(parallel=LAYOUTS[name], model=MODEL)
    results = run_distributed(in_small_chunks, config.parallel.world_size, config, 3, task)
    check(results, reference(config, 3, task))


def test_chunks_of_about_the_same_size() -> None:
    assert rows_of_chunk(8192, 128_256) == 1024 and rows_of_chunk(100, 128_256) == 100
    assert rows_of_chunk(1030, 128_256) == 640                      # not 1024 and 6
    assert rows_of_chunk(4096, 10**9) == ROWS


def test_whoever_scales_the_weighted_sum_is_told() -> None:
    class Scaled(NextToken):
        def __call__(self, *args: Any) -> list[Tensor]:
            return [2 * each for each in super().__call__(*args)]

    config, mesh = tiny_config(), single_mesh()
    model = parallelize(config, mesh, objective=Scaled())
    model.initialise(1)
    with pytest.raises(RuntimeError, match="must itself be the sum that is differentiated"):
        model.forward_backward(microbatches(config, global_batch(config, 1), mesh), 1.0)


@pytest.mark.parametrize("ahead", [True, False], ids=["weighted sum", "losses"])
def test_memory_of_the_loss_is_that_of_a_chunk(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the allocator's own reports: 1,024 tokens of 128,256 columns, of which a chunk has an eighth."""
    tokens, columns, hidden = 1024, 128_256, 8
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", columns * tokens // 8)
    config = tiny_config(model={"vocab_size": columns, "hidden_size": hidden, "num_heads": 2, "num_kv_heads": 2})
    model = parallelize(config, single_mesh())
    model.initialise(1)
    [chunk] = model.chunks.values()
    x = torch.randn(tokens, 1, hidden, requires_grad=True)
    labels = torch.randint(columns, (tokens, 1))

    def compute(logits: Tensor, labels: Tensor) -> tuple[Tensor]:
        return (model.operations.cross_entropy(logits, labels)[0],)

    model.buckets[0].begin_step(1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        if ahead:
            scale = torch.ones(())
            total, _ = weighted_sum(x, chunk.output_layer, labels=labels, weights=None, scale=scale, compute=compute)
            torch.autograd.backward(total, scale)
        else:
            per_token(x, chunk.output_layer, labels=labels, compute=compute)[0].sum().backward()
    events = sorted((event.start_ns(), event.nbytes()) for event in profiler.profiler.kineto_results.events()
                    if event.name() == "[memory]")
    peak, logits = max(accumulate(nbytes for _, nbytes in events)), 4 * tokens * columns
    print(f"the loss takes {peak / 2**20:.0f} MiB at most, all logits {logits / 2**20:.0f} MiB")
    assert peak < 2.1 * logits / 8                         # a chunk's logits and their softmax
    assert x.grad is not None and x.grad.isfinite().all()
