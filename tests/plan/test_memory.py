"""Does it fit: what the ranks would hold against what there is, and the estimate that needs no torch."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from engine.config import load_config, resolve_layout
from engine.distributed.host_memory import Room
from engine.distributed.mesh import single_mesh
from engine.errors import RequestError
from engine.parallel.parallelize import parallelize
from engine.plan.estimate import gib, least_activation_bytes, mean_state_bytes
from engine.plan.explain import StateBytes, explain
from engine.plan.memory import compare, require_room, states
from tests.kit.layouts import microbatches, tiny_config
from tests.kit.reference import global_batch

LAYOUTS: list[dict[str, Any]] = [
    {}, {"zero": 0, "data": 4}, {"zero": 1, "data": 4}, {"zero": 2, "data": 4}, {"zero": 3, "data": 4},
    {"tensor": 2, "pipeline": 2, "data": 2}, {"zero": 1, "data": 4, "zero_shard": 2}, {"context": 2, "data": 2},
    {"reproducible": True, "data": 2}, {"pipeline": 4},
]


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_the_estimate_is_the_mean_of_what_the_ranks_hold(parallel: dict[str, Any], compute: str) -> None:
    """But for padding and what every tensor rank holds, a few percent of this small model."""
    config = tiny_config(parallel=parallel, precision={"compute": compute},
                         model={"hidden_size": 128, "ffn_hidden_size": 352, "vocab_size": 1024})
    ranks = range(config.parallel.world_size)
    held = [explain(config, rank).bytes.total for rank in ranks]
    assert [each.total for each in states(config, ranks)] == held
    assert mean_state_bytes(config) == pytest.approx(sum(held) / len(held), rel=0.03)


def test_the_estimate_of_a_large_job() -> None:
    config = resolve_layout(load_config("configs/llama-65b.yaml"), 2048)
    mean = sum(explain(config, rank).bytes.total for rank in range(0, 2048, 64)) / 32
    assert mean_state_bytes(config) == pytest.approx(mean, rel=0.01)


def test_a_job_that_fits_says_what_is_left() -> None:
    [line] = compare([StateBytes(GIB, GIB, 2 * GIB)], Room(10 * GIB, "free on cuda:0"), tiny_config())
    assert line == "memory: 4.0 GiB of weights, gradients and optimizer state; 10.0 GiB free on cuda:0"
    [line] = compare([StateBytes(GIB, GIB, 2 * GIB)] * 2, None, tiny_config())
    assert line == "memory: 8.0 GiB of weights, gradients and optimizer state of 2 processes"


GIB = 2**30


def test_a_job_that_does_not_fit_is_refused_with_numbers_and_remedies() -> None:
    with pytest.raises(RequestError) as caught:
        compare([StateBytes(GIB, GIB, 2 * GIB)] * 3, Room(8 * GIB, "on this machine"), tiny_config())
    assert str(caught.value) == (
        "this job does not fit: the 3 processes on this machine would hold 12.0 GiB all the time (parameters 3.0 GiB, "
        "gradients 3.0 GiB, optimizer 6.0 GiB) and at least 0.0 MiB more in a step (batch.micro 1 × data.seq_len 16 "
        "tokens); 8.0 GiB are on this machine. Use more devices (parallel.tensor, parallel.pipeline), shard more of it "
        "over data ranks (parallel.zero, now 1), or a smaller model")


def test_a_microbatch_that_does_not_fit_is_refused() -> None:
    config = tiny_config(batch={"micro": 10**6, "global": 10**6})
    least = least_activation_bytes(config)
    assert least == 10**6 * 16 * (4 * 32 + 64) * 4
    with pytest.raises(RequestError, match=r"at least 11\.4 GiB more in a step \(batch\.micro 1000000 × data\.seq_len "
                                           r"16 tokens\); 8\.0 GiB .* Lower batch\.micro or data\.seq_len"):
        compare([StateBytes(0, 0, 0)], Room(8 * GIB, "on this machine"), config)
    assert compare([StateBytes(0, 0, 0)], Room(least, "on this machine"), config)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_no_step_takes_less_than_the_least(tmp_path: Path, recompute: str, compute: str) -> None:
    """Against what the allocator gives in one microbatch; the gradients have their memory already."""
    config = tiny_config(parallel={"recompute": recompute}, precision={"compute": compute}, model={"num_layers": 8},
                         batch={"micro": 4, "global": 4})
    model = parallelize(config, single_mesh())
    model.initialise(1)
    batches = microbatches(config, global_batch(config, 0), single_mesh())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model.forward_backward(batches, 1.0)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    taken = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event.get("ts", 0))
             if event.get("name") == "[memory]"]
    peak = max(accumulate(taken))
    assert least_activation_bytes(config) <= peak <= 40 * least_activation_bytes(config)


def test_processes_on_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(parallel={"pipeline": 2})
    held = [explain(config, rank).bytes.total + least_activation_bytes(config) for rank in range(2)]
    state = sum(explain(config, rank).bytes.total for rank in range(2))
    monkeypatch.setattr("engine.plan.memory.host_memory", lambda: Room(sum(held), "on this machine"))
    assert f"memory: {gib(state)}" in require_room(config, 1, range(2), torch.device("cpu"))[0]
    monkeypatch.setattr("engine.plan.memory.host_memory", lambda: Room(sum(held) - 1, "on this machine"))
    with pytest.raises(RequestError, match="the 2 processes on this machine"):
        require_room(config, 1, range(2), torch.device("cpu"))
    assert require_room(config, 1, [1], torch.device("cpu"))


def test_sizes_for_people() -> None:
    assert (gib(2**30), gib(3.2e9), gib(5e6)) == ("1.0 GiB", "3.0 GiB", "4.8 MiB")
