"""The time model: published runs within the errors that docs/planning.md tells, and sums that must hold."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from benchmarks.planning import ROWS, compared, table
from engine.plan.cost import Clock, Group
from engine.plan.devices import DEVICES, device, device_named_in
from engine.plan.error import relative_error
from engine.plan.practice import OCTANT
from engine.plan.step import CAUSES, step_time, with_reached
from tests.kit.layouts import tiny_config

# Set: mean and worst error allowed, a little above what is told.
ALLOWED = {"Korthikanti 2022": (0.02, 0.05), "NVIDIA H100, BF16": (0.03, 0.12), "NVIDIA H100, FP8": (0.045, 0.25),
           "SimuMax B200": (0.05, 0.21), "Narayanan 2021": (0.05, 0.16)}


def test_published_runs(tmp_path: Path) -> None:
    lines = ROWS.read_text(encoding="utf-8").splitlines()
    short = tmp_path / "rows.csv"
    short.write_text("\n".join(line for line in lines if not line.startswith('"vTrain')) + "\n")
    results = defaultdict(list)
    for one in compared(short):
        results[one.group].append(one)
    for name, (average, worst) in ALLOWED.items():
        errors = [abs(one.error) for one in results[f"time: {name}"]]
        assert mean(errors) <= average and max(errors) <= worst, (name, mean(errors), max(errors))
    assert table(results).count("\n") == 8


@pytest.mark.parametrize("parallel", [
    {}, {"tensor": 2, "data": 2}, {"pipeline": 2}, {"pipeline": 2, "schedule": "zb-h1"}, {"data": 4, "zero": 3},
    {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 2}, {"recompute": "full"}, {"context": 2},
], ids=str)
def test_the_causes_add_up(parallel: dict[str, Any]) -> None:
    time = step_time(tiny_config(parallel=parallel, precision={"compute": "bf16"}), device("a100-80g"))
    assert tuple(time.breakdown) == CAUSES
    assert sum(time.breakdown.values()) == pytest.approx(time.seconds)
    assert all(part >= 0 for part in time.breakdown.values())
    assert (time.breakdown["tensor_comm"] > 0) == (parallel.get("tensor", 1) > 1)
    assert (time.breakdown["recompute"] > 0) == ("recompute" in parallel)


def test_many_microbatches_cost_what_walking_through_all_would() -> None:
    few, more, many = (step_time(tiny_config(parallel={"pipeline": 4}, batch={"global": count}), device("cpu")).seconds
                       for count in (40, 44, 48))
    assert many - more == pytest.approx(more - few, rel=1e-9)


def test_a_slower_device_takes_longer() -> None:
    config, a100 = tiny_config(precision={"compute": "bf16"}), device("a100-80g")
    base = step_time(config, a100).seconds
    for changes in ({"product": 0.1}, {"stream": 0.01}, {"kernel": 1e-3}, {"dispatch": 1e-3}):
        assert step_time(config, with_reached(a100, **changes)).seconds > base


def test_where_ranks_lie_decides_what_links_they_use() -> None:
    assert Group.of(8, 1, 8) == Group(8, 8)
    assert Group.of(32, 8, 8) == Group(32, 1)
    assert Group.of(4, 4, 8) == Group(4, 2)
    clock = Clock(tiny_config(), device("h100-sxm"), OCTANT)
    assert clock.collective(1e9, Group(8, 8)) < clock.collective(1e9, Group(8, 1))
    assert clock.collective(1e9, Group(1, 1)) == 0


def test_devices_name_themselves(tmp_path: Path) -> None:
    assert all(name == each.name for name, each in DEVICES.items())
    head = tmp_path / "c.yaml"
    head.write_text("# for 8 × H100-SXM, or more\nmodel: {preset: tiny}   # a100-80g\n")
    assert device_named_in(str(head)) == "h100-sxm" and device_named_in("llama-65b") is None
    assert relative_error("a100-40g", 8) == relative_error("a100-80g", 8) < relative_error("cpu", 1)


def test_a_live_reference_is_one_more_forward_pass() -> None:
    sections: dict[str, Any] = {"adapter": {"rank": 2}, "run": {"objective": "dpo"}, "parallel": {"pipeline": 2}}
    cached, live = (step_time(tiny_config(**sections, dpo={"reference": how}), device("a100-80g"))
                    for how in ("cached", "live"))
    assert 1.1 < live.seconds / cached.seconds < 1.5
    assert sum(live.breakdown.values()) == pytest.approx(live.seconds)


def test_ranks_that_share_cores() -> None:
    """Who waits leaves its share to the others; and what communicates computes nothing meanwhile."""
    cpu = device("cpu")
    pipeline = tiny_config(parallel={"pipeline": 4}, batch={"global": 8})
    own, shared = (step_time(pipeline, replace(cpu, sharing=sharing)) for sharing in (1.0, 2.0))
    assert own.breakdown["pipeline_bubble"] > 0 == shared.breakdown["pipeline_bubble"]
    assert own.seconds / 2 < shared.seconds < own.seconds
    assert sum(shared.breakdown.values()) == pytest.approx(shared.seconds)
    for zero in (1, 2, 3):
        config = tiny_config(parallel={"data": 4, "zero": zero})
        beside, instead = (step_time(config, replace(cpu, overlaps=overlaps)) for overlaps in (True, False))
        assert instead.breakdown["data_comm"] > beside.breakdown["data_comm"]
        assert instead.breakdown["compute"] == pytest.approx(beside.breakdown["compute"])
