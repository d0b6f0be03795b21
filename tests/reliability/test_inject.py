"""Faults on purpose: each does what its name says, once, on its rank, in its step."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.commands.train import _load
from engine.config import Config, FaultConfig, load_config
from engine.distributed.mesh import single_mesh
from engine.distributed.topology import Topology
from engine.errors import ConfigError
from engine.metrics.events import read_events
from engine.metrics.phases import Moment
from engine.parallel.replicas import ReplicasDiffer
from engine.reliability.inject import InjectedFault, Injector
from engine.train.corpora import Corpora
from engine.train.loop import Trainer
from tests.kit.distributed import mesh_for, run_distributed
from tests.kit.runs import metrics, run_config, saved_steps, state_shards, trained, write_config


def run(config: Config) -> Any:
    """One rank of a run; what it holds at the end."""
    mesh = mesh_for(Topology.of(config)) if config.parallel.world_size > 1 else single_mesh()
    trainer = Trainer.start(config, mesh, Corpora.open(config), lambda: False)
    try:
        trainer.run()
    finally:
        trainer.close()
    return state_shards(trainer.state)


def with_fault(folder: Path, name: str, sections: dict[str, Any], **fault: Any) -> Config:
    return run_config(folder, name, **({"steps": 4} | sections), reliability={"inject": [fault]})


@pytest.mark.parametrize("parallel", [{"data": 2, "zero": 1}, {"data": 2, "zero": 3}, {"tensor": 2}, {"pipeline": 2}],
                         ids=str)
def test_nan_on_one_rank_touches_nothing_and_all_decide_alike(tmp_path: Path, parallel: dict[str, Any]) -> None:
    """No parameter, moment or counter: the state behind the skipped step is, bit for bit, the state before it."""
    sections: dict[str, Any] = {"parallel": parallel, "eval": {"every": 0}, "checkpoint": {"every": 0}}
    config = with_fault(tmp_path, "nan", sections | {"steps": 3}, kind="nan", rank=1, step=3)
    before = run_config(tmp_path, "before", **sections, steps=2)
    found, expected = (run_distributed(run, 2, each) for each in (config, before))
    for mine, want in zip(found, expected, strict=True):
        assert all(a[:3] == b[:3] and torch.equal(a[3], b[3]) for a, b in zip(mine, want, strict=True))
    assert [row["skipped"] for row in metrics(config)] == [0, 0, 1] and metrics(config)[-1]["loss"] is None
    manifest = next((Path(config.run.dir) / "checkpoints" / "step-00000003").glob("manifest*"))
    assert json.loads(manifest.read_bytes())["metadata"]["state"] == {
        "step": 3, "consumed_samples": 12, "optimizer_step": 2}


def test_a_fault_strikes_once_in_a_run_and_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = with_fault(tmp_path, "run", {}, kind="raise", step=3, phase="update")
    with pytest.raises(InjectedFault):
        run(config)
    printed = capsys.readouterr().out
    assert "FAULTS WILL BE INJECTED: kind='raise' rank=0 step=3" in printed
    assert "INJECTED FAULT: raise on rank 0 in step 3, update" in printed
    [event] = read_events(Path(config.run.dir))
    assert (event.kind, event.step, event.rank, event.detail) == ("injected", 3, 0,
                                                                  {"fault": "raise", "phase": "update"})
    whole = run_config(tmp_path, "whole", steps=4)
    run(config), run(whole)
    assert trained(config) == trained(whole)
    again = with_fault(tmp_path, "again", {}, kind="raise", step=3, every_time=True)
    for _ in range(2):
        with pytest.raises(InjectedFault):
            run(again)


def test_slow_is_as_slow_as_it_says(tmp_path: Path) -> None:
    config = with_fault(tmp_path, "run", {"steps": 3}, kind="slow", step=2, seconds=0.4, phase="load")
    run(config)
    times = [row["timing_s/load"] for row in metrics(config)]
    assert max(times[0], times[2]) < 0.3, "the time of the listeners is in the step, not in its phase"
    assert metrics(config)[1]["step_seconds"] > 0.4


def test_a_flipped_bit_is_found_by_the_comparison_of_replicas(tmp_path: Path) -> None:
    """ZeRO 0: every replica has a master of its own, and goes on with what it has."""
    config = with_fault(tmp_path, "run", {"parallel": {"data": 2, "zero": 0, "check_replicas_every": 4}},
                        kind="bit_flip", rank=1, step=3, phase="load")
    with pytest.raises(AssertionError, match=r"ReplicasDiffer: step 4: copies that must be equal differ"):
        run_distributed(run, 2, config)
    assert ReplicasDiffer.exit_code == 1


def test_a_full_disk_costs_one_save(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = with_fault(tmp_path, "run", {"checkpoint": {"every": 2}, "eval": {"every": 0}}, kind="disk_full", step=1)
    whole = run_config(tmp_path, "whole", steps=4, eval={"every": 0})
    run(config), run(whole)
    assert "warning: step 2 was not saved: " in (printed := capsys.readouterr().out)
    assert "No space left on device (injected)" in printed
    assert saved_steps(config) == [4] and trained(config) == trained(whole)


def test_a_stalled_writer_holds_up_the_save_after_it_only(tmp_path: Path) -> None:
    config = with_fault(tmp_path, "run", {"checkpoint": {"every": 2, "async": True}, "eval": {"every": 0}},
                        kind="stalled_writer", step=2, seconds=0.5)
    start = time.monotonic()
    run(config)
    assert time.monotonic() - start > 0.5 and saved_steps(config) == [2, 4]


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", time.time)                             # put back after the test
    config = with_fault(tmp_path, "run", {}, kind="clock_jump", step=2, seconds=1e6)
    whole = run_config(tmp_path, "whole", steps=4)
    run(config)
    assert time.time() > time.monotonic() + 1e6
    run(whole)
    assert trained(config) == trained(whole)
    assert all(row["step_seconds"] < 60 for row in metrics(config))


def test_a_fault_of_another_rank_or_step_passes(tmp_path: Path) -> None:
    faults = [FaultConfig(kind="raise", rank=1, step=2), FaultConfig(kind="raise", step=5, steps=2, phase="save")]
    injector = Injector(faults, 0, tmp_path, [])
    for step in (1, 2, 3, 4, 7):
        for phase in ("load", "forward_backward", "save"):
            injector(Moment(phase, step, 0.0))
    injector(Moment("load", 5, 0.0))
    for step in (5, 6):
        with pytest.raises(InjectedFault):
            injector(Moment("save", step, 0.0))


def test_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_config(run_config(tmp_path, "run"), tmp_path / "run.yaml")
    arguments = type("Arguments", (), {"config": str(path), "overrides": []})()
    monkeypatch.setenv("OCTANT_INJECT", "[{kind: hang, rank: 3, step: 5}]")
    assert _load(arguments).reliability.inject == (FaultConfig(kind="hang", rank=3, step=5),)
    monkeypatch.delenv("OCTANT_INJECT")
    assert _load(arguments).reliability.inject is None
    with pytest.raises(ConfigError, match=r"reliability.inject.*kind"):
        load_config(path, ["reliability.inject=[{kind: hug}]"])
