"""`--calibrate`: figures that made the measurements are found again, and what they say of other jobs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine import cli
from engine.bench.mfu import Measured
from engine.bench.mfu_rows import Rows, row_of
from engine.config import Config
from engine.errors import RequestError
from engine.plan.calibrate import calibrated
from engine.plan.cost import Clock
from engine.plan.devices import Device, device
from engine.plan.error import relative_error
from engine.plan.job import Planned
from engine.plan.practice import OCTANT
from engine.plan.step import step_time, with_reached
from tests.kit.layouts import tiny_config


def job(hidden: int, length: int, micro: int = 2, **parallel: Any) -> Config:
    size = {"hidden_size": hidden, "num_heads": hidden // 16, "num_kv_heads": hidden // 16, "max_seq_len": length,
            "ffn_hidden_size": hidden * 8 // 3 // 8 * 8, "vocab_size": 512, "num_layers": 4}
    return tiny_config(model=size, data={"seq_len": length}, batch={"micro": micro, "global": 8 * micro},
                       parallel=parallel)


def rows_of(truth: Device, path: Path) -> Path:
    """What a benchmark would have written of a device with these figures."""
    rows = Rows(path)
    for config in (job(64, 64), job(128, 64), job(256, 128), job(512, 64), job(64, 512), job(256, 64, 4, tensor=2)):
        time = step_time(config, truth)
        causes = {"compute": time.breakdown["compute"], "optimizer": time.breakdown["optimizer"], "tensor_comm": 1.0}
        rows.add(row_of(config, "a processor", 1, None, Measured((time.seconds,), causes, 1), None, 2.0))
    return path


def test_the_figures_behind_measurements_are_found_again(tmp_path: Path) -> None:
    base = device("cpu")
    truth = with_reached(base, product=base.reached.product * 0.3, half_depth=150.0, stream=0.3, kernel=8e-5,
                         attention=base.reached.attention * 0.2)
    found = calibrated(base, [rows_of(truth, tmp_path / "rows.json")])
    assert found.device.sharing == 2.0 and base.sharing == 1.0
    assert found.error is not None and found.error < 0.05 and found.device.off_by == found.error
    others = [job(128, 256), job(384, 64), job(96, 32, 4), job(256, 256, recompute="full")]
    for config in others:
        told, right, before = (step_time(config, on).breakdown["compute"] for on in (found.device, truth, base))
        assert told == pytest.approx(right, rel=0.1) and abs(told / right - 1) < abs(before / right - 1) / 3
    assert Planned(others[0], found.device).error == found.error < relative_error("cpu", 1)


def test_links_and_network_are_those_that_were_measured(tmp_path: Path) -> None:
    path = tmp_path / "n.json"
    figures = {"latency_seconds": 3e-5, "bytes_per_second": 2e9, "error": 0.1}
    path.write_text(json.dumps({"benchmark": "network", "world": 8, "nodes": 2, "fit": {
        "inside": figures, "across": figures | {"latency_seconds": 1e-3}}}))
    found = calibrated(device("a100-80g"), [path]).device
    assert (found.link, found.network, found.per_node, found.reached.link) == (2e9, 2e9, 4, 1.0)
    assert (found.reached.latency, found.reached.far, found.reached.network) == (3e-5, 1e-3, 1.0)
    same = replace(found, link=device("a100-80g").link)
    assert step_time(job(64, 64, tensor=4), found).seconds > step_time(job(64, 64, tensor=4), same).seconds


def test_kernels_say_what_products_copies_and_attention_reach(tmp_path: Path) -> None:
    path, on = tmp_path / "kernels.json", device("a100-80g")
    reached = {"bytes_per_second": 1.5e12, "flops_per_second": 2e14, "product": 8192}
    attention = {"operation": "attention", "dtype": "bf16", "flops": 4e12, "reached": reached,
                 "cases": [{"median_seconds": seconds} for seconds in (0.2, 0.04)]}
    path.write_text(json.dumps([attention]))
    found = calibrated(on, [path])
    assert found.said == [f"kernels: 1 operation in bf16 of {path}"] and found.error is None
    config = job(1024, 64).with_changes(precision={"compute": "bf16"})
    clock, shares = Clock(config, found.device, OCTANT), found.device.reached
    assert clock.product(8192, 8192, 8192) - shares.kernel == pytest.approx(2 * 8192**3 / 2e14)
    assert clock.stream(3e12, 0) == pytest.approx(2.0)
    assert shares.attention * on.peaks["bf16"] == pytest.approx(1e14)          # of the faster one
    path.write_text(json.dumps([attention | {"dtype": "fp64"}]))
    with pytest.raises(RequestError, match="has no peak"):
        calibrated(on, [path])


@pytest.mark.parametrize("content", ["", "[]", '{"benchmark": "kernels"}', "no json"])
def test_files_of_something_else_are_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text(content)
    assert cli.run(["plan", "tiny", "--calibrate", str(tmp_path / "x.json")]) == 2
    assert "no file that octant bench network, octant bench kernels or octant bench mfu" in capsys.readouterr().err


def test_a_plan_says_what_it_was_calibrated_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = rows_of(device("cpu"), tmp_path / "rows.json")
    assert cli.run(["plan", "tiny", "--gpu", "cpu", "--calibrate", str(path)]) == 0
    assert f"calibrated with computation: 6 rows of {path}" in capsys.readouterr().out
