"""Spikes and what is done about them: seen, skipped, or gone back for; a poisoned range of data is left out."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import cli
from engine.config import Config, RewindConfig, SpikeConfig
from engine.data.skipping import stream_index
from engine.distributed.mesh import single_mesh
from engine.distributed.topology import Topology
from engine.errors import WorkerError
from engine.metrics.events import read_events
from engine.parallel.parallelize import ParallelModel
from engine.reliability.rewind import REWINDS_FILE, Rewind, choose, remembered, stream_range
from engine.reliability.spikes import SpikeMonitor
from engine.train.batches import Loader, StepBatches
from engine.train.corpora import Corpora
from engine.train.rank import keep_training
from tests.kit.distributed import mesh_for, run_distributed
from tests.kit.runs import metrics, run_config, saved_steps, trained, write_config

CPU = torch.device("cpu")


def run_on_poisoned_data(config: Config, poison: tuple[int, int], factor: float) -> str:
    """Gradients of steps that take a sample of this range of the stream are multiplied; how the run ended."""
    mesh = mesh_for(Topology.of(config)) if config.parallel.world_size > 1 else single_mesh()
    seen = {"poisoned": False}
    step, finish = Loader.step, ParallelModel.finish_reduction

    def noting_step(self: Loader, first: int) -> StepBatches:
        skip = self._samples.__self__.skip                                             # type: ignore[attr-defined]
        samples = [stream_index(skip, i) for i in range(first, first + config.batch.global_)]
        seen["poisoned"] = any(poison[0] <= sample < poison[1] for sample in samples)
        return step(self, first)

    def poisoned_finish(self: ParallelModel) -> None:
        finish(self)
        if seen["poisoned"]:
            for bucket in self.buckets:
                bucket.grad_shard.mul_(factor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "step", noting_step)
        patch.setattr(ParallelModel, "finish_reduction", poisoned_finish)
        try:
            assert keep_training(config, mesh, Corpora.open(config), lambda: False)
        except WorkerError as error:
            return str(error)
    return ""


def poisoned_config(folder: Path, name: str, steps: int = 24, **sections: Any) -> Config:
    reliability = {"max_skips": 2, "rewind": {"steps": 3, "skip_batches": 6},
                   "spike": {"window": 8, "z": 50.0, "action": "rewind"}} | sections.pop("reliability", {})
    return run_config(folder, name, steps=steps, reliability=reliability, eval={"every": 0},
                      checkpoint={"every": 2}, **sections)


@pytest.mark.parametrize(("factor", "parallel"), [(1e6, {}), (float("nan"), {}), (float("nan"), {"data": 2})], ids=str)
@pytest.mark.parametrize("log_every", [1, 5])
def test_a_poisoned_range_is_left_out_as_if_it_had_never_been(tmp_path: Path, factor: float, parallel: dict[str, int],
                                                              log_every: int) -> None:
    """Steps 15 and 16 are poisoned.  From the rewind on, the run is bit for bit the one that never had those data."""
    config = poisoned_config(tmp_path, "run", parallel=parallel, log={"every": log_every})
    ended = run_distributed(run_on_poisoned_data, config.parallel.world_size, config, (14 * 4, 16 * 4), factor)
    assert set(ended) == {""}
    [rewind] = remembered(Path(config.run.dir))
    spiked = factor > 0
    assert rewind.to_step == 10 and rewind.skip == (11 * 4, 17 * 4)
    assert rewind.why == ("a spike at step 15" if spiked else "2 steps skipped from 15 on")
    clean = poisoned_config(tmp_path, "clean", parallel=parallel, log={"every": log_every},
                            data={"skip": [[11 * 4, 17 * 4]], "train": [{"path": str(tmp_path / "train")}]})
    run_distributed(run_on_poisoned_data, clean.parallel.world_size, clean, (14 * 4, 16 * 4), factor)
    assert trained(config) == trained(clean) and metrics(config)[-1]["skipped"] == 0
    kinds = [event.kind for event in read_events(Path(config.run.dir))]
    assert "rewind" in kinds and ("spike" in kinds) == spiked and kinds.count("end") == 1
    assert (Path(config.run.dir) / "earlier-1" / "checkpoints" / "step-00000014").is_dir()
    manifest = next((Path(config.run.dir) / "checkpoints" / "step-00000024").glob("manifest*"))
    assert json.loads(manifest.read_bytes())["metadata"]["data"]["skip"] == [[11 * 4, 17 * 4]]


def test_a_rewind_that_does_not_help_is_tried_so_often(tmp_path: Path) -> None:
    """Everything from step 15 on is poisoned, whatever is left out."""
    config = poisoned_config(tmp_path, "run", steps=60,
                             reliability={"rewind": {"steps": 3, "skip_batches": 6, "tries": 2}})
    ended = run_on_poisoned_data(config, (14 * 4, 10_000), float("nan"))
    assert ended.startswith("gave up after step 10: 2 steps in a row had a gradient that is not finite")
    assert [rewind.to_step for rewind in remembered(Path(config.run.dir))] == [10, 8]


def test_stop_gives_up_at_the_first(tmp_path: Path) -> None:
    config = poisoned_config(tmp_path, "run", reliability={"on_nonfinite": "stop"})
    ended = run_on_poisoned_data(config, (14 * 4, 15 * 4), float("nan"))
    assert ended.startswith("gave up after step 15: 1 step in a row") and not remembered(Path(config.run.dir))


@pytest.mark.parametrize(("action", "skipped"), [("warn", 0), ("skip", 1)])
def test_a_spike_is_warned_of_or_skipped(tmp_path: Path, action: str, skipped: int,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    config = poisoned_config(tmp_path, "run", reliability={"spike": {"window": 8, "z": 50.0, "action": action}})
    assert run_on_poisoned_data(config, (14 * 4, 15 * 4), 1e6) == ""
    assert "warning: step 15: loss or gradient norm is " in capsys.readouterr().out
    assert metrics(config)[-1]["skipped"] == skipped
    [event] = [event for event in read_events(Path(config.run.dir)) if event.kind == "spike"]
    assert event.step == 15 and event.detail["z"] > 50 and event.detail["action"] == action


def test_z_is_the_textbooks() -> None:
    monitor, generator = SpikeMonitor(SpikeConfig(window=8), CPU), random.Random(1)
    values = [generator.gauss(3, 1) for _ in range(7)]
    assert monitor.z(torch.tensor(9.0), torch.tensor(1.0)) == 0, "nothing to compare with"
    for value in values:
        monitor.remember(torch.tensor(value), torch.tensor(1.0), torch.tensor(False))
    median = sorted(values)[3]
    mad = sorted(abs(value - median) for value in values)[3]
    assert monitor.z(torch.tensor(9.0), torch.tensor(1.0)).item() == pytest.approx((9 - median) / (1.4826 * mad))
    assert monitor.z(torch.tensor(3.0), torch.tensor(1.05)).item() == pytest.approx(50, rel=1e-3)
    assert monitor.z(torch.tensor(float("nan")), torch.tensor(0.0)) == 0, "that is not for this module to judge"
    state, other = monitor.state(), SpikeMonitor(SpikeConfig(window=8), CPU)
    other.restore(json.loads(json.dumps(state, allow_nan=False)))
    assert other.state() == state
    monitor.remember(torch.tensor(99.0), torch.tensor(99.0), torch.tensor(True))
    assert monitor.z(torch.tensor(9.0), torch.tensor(1.0)).item() == pytest.approx((9 - median) / (1.4826 * mad))


def done(*to_steps: int) -> list[Rewind]:
    return [Rewind(99, step, (0, 1), "", "") for step in to_steps]


@pytest.mark.parametrize(("anomaly", "saved", "before", "expected"), [
    (1001, [500, 800, 900, 1000], [], (900, 900, 1200)),      # the newest at least 100 steps back
    (1001, [500, 1000], [], (500, 900, 1200)),                # older: the data from 100 steps back on
    (1001, [950, 1000], [], (950, 950, 1250)),                # none so far back: the oldest
    (51, [], [], (0, 0, 300)),                                # nothing saved: the beginning
    (1001, [1001, 1002], [], None),                           # everything saved has seen it
    (1001, [900], done(900, 800, 900), (900, 900, 1200)),     # twice from here, once from before
    (1001, [900], done(900, 900, 950), None),                 # three times, once from even later
])
def test_where_to(anomaly: int, saved: list[int], before: list[Rewind], expected: tuple[int, int, int] | None) -> None:
    assert choose(anomaly, anomaly + 2, saved, RewindConfig(), before) == expected


def test_what_is_left_out_reaches_the_anomaly() -> None:
    assert choose(1001, 1004, [500], RewindConfig(steps=100, skip_batches=20), []) == (500, 900, 1004)
    assert stream_range(((10, 20),), 8, 12) == (8, 22), "over what is left out already"


def test_by_hand_and_remembered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once in the folder; the plain command goes on after it, as a run that never had those data."""
    config = run_config(tmp_path, "run", steps=8, eval={"every": 0})
    path = write_config(config, tmp_path / "run.yaml")
    assert cli.run(["train", str(path)]) == 0
    assert cli.run(["rewind", config.run.dir, "--to", "4", "--skip-steps", "3"]) == 0
    assert "samples 16 to 27 of the stream (3 steps) are left out from now on" in (printed := capsys.readouterr().out)
    assert f"what it held of later steps is in {config.run.dir}/earlier-1" in printed
    assert saved_steps(config) == [2, 4]
    for _ in range(2):
        assert cli.run(["train", str(path)]) == 0
    clean = run_config(tmp_path, "clean", steps=8, eval={"every": 0},
                       data={"skip": [[16, 28]], "train": [{"path": str(tmp_path / "train")}]})
    assert cli.run(["train", str(write_config(clean, tmp_path / "clean.yaml"))]) == 0
    assert trained(config) == trained(clean)
    assert [event.kind for event in read_events(Path(config.run.dir))].count("rewind") == 1
    capsys.readouterr()
    for words, message in ((["--to", "3", "--skip-steps", "1"], "no checkpoint of step 3; it has those of 2, 4, 6, 8"),
                           (["--to", "4", "--skip-steps", "0"], "at least one to skip")):
        assert cli.run(["rewind", config.run.dir, *words]) == 2
        assert message in capsys.readouterr().err
    assert cli.run(["rewind", str(tmp_path), "--to", "4", "--skip-steps", "1"]) == 2
    assert cli.run(["train", str(path), "checkpoint.resume=never"]) == 0
    assert not (Path(config.run.dir) / REWINDS_FILE).exists(), "another line of training has another memory"
    assert remembered(Path(config.run.dir) / "earlier-2")
    (Path(config.run.dir) / REWINDS_FILE).write_text("[{]")
    capsys.readouterr()
    assert cli.run(["train", str(path)]) == 2
    assert "rewinds.json, which says what data the run leaves out, cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("log_every", [1, 5])
def test_a_gradient_beyond_the_limit_changes_nothing(tmp_path: Path, log_every: int,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    """As a spike that is skipped does not; it is counted, said, and found in the events."""
    def run(name: str, **rule: Any) -> Config:
        config = poisoned_config(tmp_path, name, log={"every": log_every}, reliability={"spike": None} | rule)
        assert run_on_poisoned_data(config, (14 * 4, 15 * 4), 1e3) == ""
        return config

    runs = (run("limit", max_grad_norm=100.0), run("spike", spike={"window": 8, "z": 50.0, "action": "skip"}),
            run("neither"))
    assert trained(runs[0]) == trained(runs[1]) != trained(runs[2])
    assert [metrics(each)[-1]["skipped"] for each in runs] == [1, 1, 0]
    found = [{(event.kind, event.step) for event in read_events(Path(config.run.dir))
              if event.kind not in ("start", "save", "end")}
             for config in runs]
    assert found == [{("skip", 15), ("too_large", 15)}, {("skip", 15), ("spike", 15)}, set()]
    said = "step 15 changed nothing: its gradient norm is above reliability.max_grad_norm(100)"
    assert said in capsys.readouterr().out


def test_gradients_that_stay_beyond_the_limit_end_the_run(tmp_path: Path) -> None:
    config = poisoned_config(tmp_path, "run", reliability={"rewind": None, "max_grad_norm": 1e-9})
    assert "not finite, or larger than reliability.max_grad_norm(1e-09), and" in run_on_poisoned_data(config, (0, 0), 1)
