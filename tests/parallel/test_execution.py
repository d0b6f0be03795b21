"""The executor does what the schedule says: the same actions in the same order, and no more activations held.

Held activations are counted twice: by the executor, and by what autograd really keeps.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

import engine.parallel.pipeline.executor as executor
from engine.config import Config
from engine.schedules.action import Action
from engine.schedules.lowering import lower
from engine.schedules.simulate import Costs, simulate
from engine.schedules.table import build_schedule
from tests.kit.distributed import run_distributed
from tests.kit.layouts import microbatches, tiny_config
from tests.kit.recording import Recording, build, record_layout
from tests.kit.reference import global_batch

SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("zb-h1", 1), ("zb-h2", 1), ("interleaved", 2), ("interleaved", 3), ("zb-v", 2)]


def config_of(schedule: str, chunks: int, stages: int, num_microbatches: int, **parallel: Any) -> Config:
    return tiny_config(parallel={"pipeline": stages, "schedule": schedule, "virtual_stages": chunks} | parallel,
                       model={"num_layers": stages * chunks}, batch={"global": num_microbatches})


def computed_before(message: str, names: list[str]) -> int:
    return sum("SEND" not in name and "RECV" not in name for name in names[: names.index(message)])


@pytest.mark.parametrize("schedule, chunks", SCHEDULES)
@pytest.mark.parametrize("stages, num_microbatches", [(1, 3), (2, 8), (3, 7), (4, 3)])
def test_executed_order_is_the_schedules(schedule: str, chunks: int, stages: int, num_microbatches: int) -> None:
    config = config_of(schedule, chunks, stages, num_microbatches)
    lowered = lower(build_schedule(schedule, stages, num_microbatches, chunks))
    peaks = simulate(lowered, Costs()).peak_in_flight
    for rank, (program, recording) in enumerate(zip(lowered.programs, record_layout(config), strict=True)):
        done, planned = recording.actions, [str(action) for action in program]
        assert sorted(done) == sorted(planned)
        messages = [name for name in planned if "SEND" in name or "RECV" in name]
        computations = [name for name in planned if name not in messages]
        assert [name for name in done if name in computations] == computations
        assert [name for name in done if name in messages] == messages
        for name in messages:      # a receive may move over one computation, so that the message travels under it
            moved = computed_before(name, planned) - computed_before(name, done)
            assert moved in ((0, 1) if "RECV" in name else (0,)), (rank, name, done, planned)
        assert recording.extra["peak"] == peaks[rank]
        assert recording.extra["recorded by autograd"] == [False] * recording.num_buckets


class Kept:
    """What stands in for a tensor that autograd saves; autograd alone holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def count_kept(config: Config) -> tuple[int, int]:
    """Runs on one rank: the most (chunk, microbatch) whose saved tensors lived at once, and how many are left."""
    model, _, mesh = build(config, 6000)
    batches = microbatches(config, global_batch(config, 1), mesh)
    kept: dict[tuple[int, int], list[weakref.ref[Any]]] = defaultdict(list)
    current: list[Action] = []
    peak = 0

    def alive() -> int:
        return sum(any(ref() is not None for ref in refs) for refs in kept.values())

    def pack(tensor: Tensor) -> Kept:
        holder = Kept(tensor)
        kept[current[-1].chunk, current[-1].microbatch].append(weakref.ref(holder))
        return holder

    run = dict(model.executor._do)

    def watched(action: Action) -> None:
        nonlocal peak
        current.append(action)
        run[action.kind](action)
        peak = max(peak, alive())

    model.executor._do = dict.fromkeys(run, watched)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        model.forward_backward(batches, 1e-3)
    return peak, alive()


@pytest.mark.parametrize("schedule, chunks", [("gpipe", 1), ("1f1b", 1), ("interleaved", 2)])
def test_autograd_keeps_as_many_activations_as_the_simulator_says(schedule: str, chunks: int) -> None:
    """Where B and W are one: the graph of a microbatch lives from its F to its BW, and nothing outlives the step."""
    config = config_of(schedule, chunks, stages=3, num_microbatches=7)
    peaks = simulate(build_schedule(schedule, 3, 7, chunks), Costs()).peak_in_flight
    assert run_distributed(count_kept, 3, config) == [(peak, 0) for peak in peaks]


def count_waiting(config: Config) -> tuple[int, int]:
    """Runs on one rank: the most microbatches whose weight gradients waited for W at once, and how many are left."""
    model, _, mesh = build(config, 6000)
    batches = microbatches(config, global_batch(config, 1), mesh)
    engine, peak = model.executor, 0

    def watched(name: str) -> Any:
        nonlocal peak
        peak = max(peak, len(engine._weight_work))
        return torch.profiler.record_function(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "record_function", watched)
        model.forward_backward(batches, 1e-3)
    return peak, len(engine._weight_work)


@pytest.mark.parametrize("schedule, factor", [("zb-h1", 1), ("zb-h2", 2)])
def test_weight_gradients_wait_as_long_as_the_schedule_says(schedule: str, factor: int) -> None:
    """Rank r runs W factor·r microbatches behind B."""
    config = config_of(schedule, 1, stages=3, num_microbatches=8)
    assert run_distributed(count_waiting, 3, config) == [(factor * rank + 1, 0) for rank in range(3)]


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_levels_change_no_order(level: int) -> None:
    """What data parallelism does happens inside the actions."""
    recordings: list[Recording] = record_layout(config_of("zb-h1", 1, 2, 8, data=2, zero=level))
    assert all(recording.actions == recording.extra["program"] for recording in recordings)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_weight_gradients_are_left_to_w(recompute: str) -> None:
    """Of recomputed layers too, whose weights autograd holds under another name.  The output layer's, the last chunk's,
    comes with the loss."""
    for recording in record_layout(config_of("zb-h1", 1, 2, 4, recompute=recompute)):
        action, inside = "", set()
        for event in recording.events:
            if event.what == "action":
                action = event.name
            elif event.name == "weight gradient":
                inside.add(action)
        assert inside == {name for name in recording.actions
                          if name.startswith("1F") or ("W" in name and "BW" not in name)}
