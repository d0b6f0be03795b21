"""`metrics.jsonl`: valid JSON whatever the numbers, readable while it grows, each step once after a resume."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import LogConfig
from engine.errors import RequestError
from engine.metrics.sinks import JsonlSink, open_sinks


def read(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read(path)]


def log_steps(run_dir: Path, first: int, last: int, resumed: int) -> None:
    (sink,) = open_sinks(LogConfig(), run_dir, resumed)
    for step in range(first, last + 1):
        sink.log({"step": step, "loss": float(resumed)})
    sink.close()


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.log({"step": 1, "loss": float("nan"), "grad_norm": np.float32("inf"), "lr": torch.tensor(-torch.inf),
              "mfu": None, "skipped": True, "tokens": np.int64(7)})
    assert read(sink.path) == [{"step": 1, "loss": None, "grad_norm": None, "lr": None, "mfu": None, "skipped": True,
                                "tokens": 7}]


def test_each_record_can_be_read_at_once(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        sink.log({"step": step})
        assert steps(sink.path)[-1] == step


def test_resume_drops_the_steps_that_are_trained_again(tmp_path: Path) -> None:
    log_steps(tmp_path, 1, 14, resumed=0)
    log_steps(tmp_path, 11, 12, resumed=10)
    assert [(r["step"], r["loss"]) for r in read(tmp_path / "metrics.jsonl")] == [
        *((step, 0.0) for step in range(1, 11)), (11, 10.0), (12, 10.0)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_fresh_start_begins_anew(tmp_path: Path) -> None:
    log_steps(tmp_path, 1, 5, resumed=0)
    log_steps(tmp_path, 1, 2, resumed=0)
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', '{"step": 3}', "\x00\x00\x00", "[1]\n"])
def test_resume_mends_a_line_that_was_cut_short(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + tail)
    log_steps(tmp_path, 3, 4, resumed=2)
    assert steps(path) == [1, 2, 3, 4]


def test_truncation_replaces_the_file_in_one_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_steps(tmp_path, 1, 4, resumed=0)
    path = tmp_path / "metrics.jsonl"

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        JsonlSink(path).truncate_after(2)
    assert steps(path) == [1, 2, 3, 4]


def test_truncation_counts_and_leaves_a_whole_file_alone(tmp_path: Path) -> None:
    log_steps(tmp_path, 1, 4, resumed=0)
    sink, before = JsonlSink(tmp_path / "metrics.jsonl"), (tmp_path / "metrics.jsonl").stat()
    assert sink.truncate_after(4) == 0
    assert sink.path.stat().st_ino == before.st_ino
    assert sink.truncate_after(1) == 3


@pytest.mark.parametrize(("config", "package", "without"), [
    (LogConfig(tensorboard=True), "tensorboard", "log.tensorboard=false"),
    (LogConfig(wandb="project"), "wandb", "log.wandb=null"),
])
def test_missing_package_is_refused_with_both_remedies(config: LogConfig, package: str, without: str, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)          # `import` then fails as if it were not installed
    log_steps(tmp_path, 1, 3, resumed=0)
    with pytest.raises(RequestError, match=package) as error:
        open_sinks(config, tmp_path, 0)
    assert "[viz]" in str(error.value) and without in str(error.value)
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3]    # refused before anything was touched


class FakeWandb:
    """What the sink uses of wandb, remembering the calls."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []

    def init(self, **options: Any) -> SimpleNamespace:
        self.runs.append(options)
        return SimpleNamespace(log=self.logged.append, finish=lambda: None, define_metric=lambda *a, **k: None)


def test_wandb_resumes_under_the_same_identity_and_starts_under_a_new_one(tmp_path: Path,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for resumed in (0, 5, 0):
        for sink in open_sinks(LogConfig(wandb="project"), tmp_path, resumed):
            sink.log({"step": resumed + 1, "loss": 2.0, "mfu": None, "grad_norm": float("nan")})
            sink.close()
    first, resumed_run, fresh = (run["id"] for run in wandb.runs)
    assert first == resumed_run != fresh
    assert wandb.runs[0]["project"] == "project"
    assert wandb.logged[0] == {"step": 1, "loss": 2.0}


def test_tensorboard_scalars_and_resume(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for resumed, last in ((0, 4), (2, 5)):
        for sink in open_sinks(LogConfig(tensorboard=True), tmp_path, resumed):
            for step in range(resumed + 1, last + 1):
                sink.log({"step": step, "loss": float(resumed), "mfu": None})
            sink.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0), (2, 0), (3, 2), (4, 2), (5, 2)]
