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

from engine.errors import RequestError
from engine.metrics.sinks import JsonlSink, open_sinks
from tests.kit.layouts import tiny_config


def read(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read(path)]


def log_steps(run_dir: Path, first: int, last: int, resumed: int) -> None:
    (sink,) = open_sinks(tiny_config(), run_dir, resumed)
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


@pytest.mark.parametrize(("log", "package", "remedies"), [
    ({"tensorboard": True}, "tensorboard", ("octant[viz]", "log.tensorboard=false")),
    ({"wandb": "project"}, "wandb", ("octant[viz]", "log.wandb=null")),
    ({"mlflow": "experiment"}, "mlflow", ("pip install mlflow", "log.mlflow=null")),
])
def test_missing_package_is_refused_with_both_remedies(log: dict[str, Any], package: str, remedies: tuple[str, str],
                                                       tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)          # `import` then fails as if it were not installed
    log_steps(tmp_path, 1, 3, resumed=0)
    with pytest.raises(RequestError, match=package) as error:
        open_sinks(tiny_config(log=log), tmp_path, 0)
    assert all(remedy in str(error.value) for remedy in remedies)
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3]    # refused before anything was touched


class FakeWandb:
    """What the sink uses of wandb, remembering the calls."""

    class Error(Exception):
        """As wandb's own."""

    def __init__(self, logged_in: bool = True) -> None:
        self.runs: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.logged_in = logged_in

    def init(self, **options: Any) -> SimpleNamespace:
        if not self.logged_in:
            raise self.Error("No API key configured. Use `wandb login` to log in.")
        self.runs.append(options)
        return SimpleNamespace(log=self.logged.append, finish=lambda: None, define_metric=lambda *a, **k: None)


class FakeMlflow:
    """What the sink uses of MLflow: parameters that do not change, metrics by step."""

    class exceptions:
        class MlflowException(Exception):
            """As MLflow's own."""

    def __init__(self, reachable: bool = True) -> None:
        self.reachable, self.experiment = reachable, ""
        self.runs: list[tuple[str | None, str]] = []
        self.params: dict[str, str] = {}
        self.metrics: list[tuple[int, dict[str, float]]] = []

    def set_experiment(self, name: str) -> None:
        if not self.reachable:
            raise self.exceptions.MlflowException("no such server")
        self.experiment = name

    def start_run(self, run_id: str | None, run_name: str) -> SimpleNamespace:
        self.runs.append((run_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or f"id-{len(self.runs)}"))

    def log_params(self, params: dict[str, str]) -> None:
        assert max(map(len, params.values())) <= 500
        self.params |= params

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics.append((step, metrics))

    def end_run(self) -> None:
        """Nothing to remember."""


ROW = {"loss": 2.0, "mfu": None, "grad_norm": float("nan")}


def test_wandb_resumes_under_the_same_identity_and_starts_under_a_new_one(tmp_path: Path,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for resumed in (0, 5, 0):
        for sink in open_sinks(tiny_config(log={"wandb": "project"}), tmp_path, resumed):
            sink.log({"step": resumed + 1, **ROW})
            sink.close()
    first, resumed_run, fresh = (run["id"] for run in wandb.runs)
    assert first == resumed_run != fresh
    assert wandb.runs[0]["project"] == "project"
    assert wandb.logged[0] == {"step": 1, "loss": 2.0}


@pytest.mark.parametrize(("run", "name"), [({}, None), ({"name": "baseline"}, "baseline")])
def test_wandb_gets_the_configuration_and_a_name(run: dict[str, Any], name: str | None, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    wandb, config = FakeWandb(), tiny_config(log={"wandb": "project"}, run=run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    open_sinks(config, tmp_path)
    assert wandb.runs[0]["config"] == config.to_dict() and wandb.runs[0]["name"] == (name or tmp_path.name)


@pytest.mark.parametrize(("log", "module", "message"), [
    ({"wandb": "p"}, FakeWandb(logged_in=False), "log.wandb: Weights & Biases cannot be used (No API key configured. "
     "Use `wandb login` to log in.): log in with `wandb login`, keep the records here with WANDB_MODE=offline, or set "
     "log.wandb=null"),
    ({"mlflow": "e"}, FakeMlflow(reachable=False), "log.mlflow: MLflow cannot be used (no such server): set "
     "MLFLOW_TRACKING_URI to a server that is there, or log.mlflow=null"),
], ids=["wandb", "mlflow"])
def test_a_service_that_cannot_be_used_is_refused(log: dict[str, Any], module: object, message: str, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    [package] = log
    monkeypatch.setitem(sys.modules, package, module)
    log_steps(tmp_path, 1, 3, resumed=0)
    with pytest.raises(RequestError) as caught:
        open_sinks(tiny_config(log=log), tmp_path)
    assert str(caught.value) == message
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3]


def test_mlflow_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow, config = FakeMlflow(), tiny_config(log={"mlflow": "experiment"}, run={"name": "n"})
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    for resumed in (0, 5, 0):
        for sink in open_sinks(config, tmp_path, resumed):
            sink.log({"step": resumed + 1, **ROW})
            sink.close()
    assert mlflow.experiment == "experiment"
    assert mlflow.runs == [(None, "n"), ("id-1", "n"), (None, "n")]
    assert mlflow.metrics == [(1, {"loss": 2.0}), (6, {"loss": 2.0}), (1, {"loss": 2.0})]
    assert mlflow.params["model.num_layers"] == "4" and mlflow.params["batch.global"] == "8"


def test_tensorboard_scalars_and_resume(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for resumed, last in ((0, 4), (2, 5)):
        for sink in open_sinks(tiny_config(log={"tensorboard": True}), tmp_path, resumed):
            for step in range(resumed + 1, last + 1):
                sink.log({"step": step, "loss": float(resumed), "mfu": None})
            sink.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0), (2, 0), (3, 2), (4, 2), (5, 2)]
