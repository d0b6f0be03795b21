"""A slow rank is named by its own time, which the others' waiting does not hide."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.distributed.topology import Topology
from engine.distributed.waits import Timed, Waits
from engine.metrics.events import read_events
from engine.reliability.stragglers import Pace, slow_ranks
from engine.report.facts import facts
from engine.report.runs import read_run
from engine.train.corpora import Corpora
from engine.train.loop import Trainer
from engine.train.rank import _write_about
from tests.kit.distributed import mesh_for, run_distributed
from tests.kit.runs import metrics, run_config


def run(config: object) -> None:
    mesh = mesh_for(Topology.of(config))                                                   # type: ignore[arg-type]
    trainer = Trainer.start(config, mesh, Corpora.open(config), lambda: False)             # type: ignore[arg-type]
    if mesh.rank == 0:
        _write_about(trainer, Path(trainer.config.run.dir), "")
    try:
        trainer.run()
    finally:
        trainer.close()


@pytest.mark.parametrize("parallel", [{"data": 2, "zero": 1}, {"data": 2, "zero": 3}, {"tensor": 2}, {"pipeline": 2},
                                      {"context": 2}], ids=str)
def test_an_injected_slow_rank_is_named(tmp_path: Path, parallel: dict[str, int],
                                        capfd: pytest.CaptureFixture[str]) -> None:
    """Both ranks take as long; only rank 1's own time says who is slow."""
    fault = {"kind": "slow", "rank": 1, "step": 3, "seconds": 1.0, "steps": 3}
    config = run_config(tmp_path, "run", steps=6, parallel=parallel, eval={"every": 0}, checkpoint={"every": 0},
                        reliability={"inject": [fault]})
    run_distributed(run, 2, config)
    rows = [row for row in metrics(config) if row["step"] in (3, 4, 5)]
    for row in rows:
        assert row["slowest_rank"] == 1 and row["slowest_seconds"] > max(1.0, row["own_seconds"])
        assert row["waiting_seconds"] > 0.2, "the mean: one rank waits for nearly a second"
    events = [event for event in read_events(Path(config.run.dir)) if event.kind == "straggler"]
    assert [event.step for event in events if 1 in event.detail["ranks"]][-1:] in ([4], [5]), "once, the third time"
    said = facts(read_run(config.run.dir))
    assert "rank 1 in " in said["Slow ranks"] and said["Goodput"].startswith(tuple("0123456789"))


def test_who_stands_out() -> None:
    assert slow_ranks([1.0, 1.1, 1.6, 0.9], 1.5) == {2} and slow_ranks([1.0, 1.1, 1.6, 0.9], None) == set()
    assert slow_ranks([0.001, 0.04], 1.5) == set(), "less than what noise does"
    assert slow_ranks([0.1, 0.2], 1.5) == {1}, "of two, the faster one is the middle"
    assert Pace([1.0, 3.0], 0.5).record() == {"own_seconds": 1.0, "slowest_seconds": 3.0, "slowest_rank": 1,
                                              "waiting_seconds": 0.5}


def test_waits_are_counted_while_they_are_asked_for() -> None:
    class Work:
        def wait(self) -> None:
            torch.randn(300, 300) @ torch.randn(300, 300)

    waits = Waits(torch.device("cpu"))
    work = Timed(Work(), waits)
    work.wait()
    assert waits.taken() == 0
    waits.on = True
    work.wait()
    assert waits.taken() > 0 and waits.taken() == 0
