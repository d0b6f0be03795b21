"""The story of a run: what it did otherwise after a resume is kept, told by `octant log`, and marked in the report."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from engine import cli
from engine.config import Config
from engine.distributed.mesh import single_mesh
from engine.metrics.events import Event, append_event, read_events
from engine.report.story import story
from engine.train.corpora import Corpora
from engine.train.rank import keep_training
from tests.kit.runs import metrics, run_config

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def run(folder: Path, steps: int, **sections: Any) -> Config:
    config = run_config(folder, "run", steps=steps, eval={"every": 0}, checkpoint={"every": 2}, **sections)
    assert keep_training(config, single_mesh(), Corpora.open(config), lambda: False)
    return config


def test_changes_at_a_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What people change in the middle: rate, clipping, decay of weights and of the second moment."""
    run(tmp_path, 4, optim={"lr": 0.01, "grad_clip": 1.5, "min_lr": 0.001})
    config = run(tmp_path, 6, optim={"lr": 0.0075, "grad_clip": 0.3, "weight_decay": 0.05, "betas": [0.9, 0.98],
                                     "min_lr": 0.001})
    directory = Path(config.run.dir)
    [changed] = [event for event in read_events(directory) if event.kind == "changed"]
    assert changed.step == 4 and changed.detail == {
        "optim.lr": [0.01, 0.0075], "optim.grad_clip": [1.5, 0.3], "optim.weight_decay": [0.1, 0.05],
        "optim.betas": [[0.9, 0.95], [0.9, 0.98]], "steps": [4, 6]}
    assert metrics(config)[-1]["step"] == 6
    capsys.readouterr()
    assert cli.run(["log", str(directory)]) == 0
    told = [re.sub(r"^[-0-9]+ [0-9:]+ +", "", line) for line in capsys.readouterr().out.splitlines()]
    assert [re.sub(r" on .*", "", line) for line in told] == [
        "step         0  began", "step       2–4  saved 2 times", "step         4  finished",
        "step         4  changed: steps 4 → 6; optim.lr 0.01 → 0.0075; optim.betas [0.9, 0.95] → [0.9, 0.98]; "
        "optim.weight_decay 0.1 → 0.05; optim.grad_clip 1.5 → 0.3",
        "step         4  continued", "step         6  saved", "step         6  finished"]
    assert cli.run(["report", str(directory)]) == 0
    page = (directory / "report.html").read_text()
    assert "after step 4: steps 4 → 6; optim.lr 0.01 → 0.0075" in page and 'class="change"' in page


def test_the_same_again_is_no_change(tmp_path: Path) -> None:
    config = run(tmp_path, 2)
    assert keep_training(config, single_mesh(), Corpora.open(config), lambda: False)
    assert [event.kind for event in read_events(Path(config.run.dir))] == ["start", "save", "end", "start", "end"]


def event(kind: str, step: int, rank: int = 0, **detail: Any) -> Event:
    return Event(NOON, kind, step, rank, detail)


def test_every_kind_of_event_is_told() -> None:
    start = {"host": "gpu7", "processes": 8, "device": "cuda (H100)", "octant": "0.1.0", "commit": None}
    events = [event("start", 0, **start), event("save", 100), event("save", 200),
              event("skip", 210, steps=1, in_a_row=1), event("skip", 211, steps=2, in_a_row=3),
              event("too_large", 211, steps=1),
              event("spike", 250, z=7.1, action="rewind"),
              event("rewind", 251, to_step=200, skip=[400, 480], why="a spike at step 250"),
              event("start", 200, **start), event("hang", 260, rank=3, what="all-reduce"), event("start", 200, **start),
              event("unheard", 270, what="of"), event("end", 300, finished=False)]
    assert [line.removeprefix("2026-03-01 12:00:00  step ") for line in story(events)] == [
        "        0  began on gpu7: 8 processes, cuda (H100), octant 0.1.0",
        "  100–200  saved 2 times",
        "  210–211  3 steps changed nothing",
        "      211  1 step changed nothing: the gradient's norm was above reliability.max_grad_norm",
        "      250  spike: 7.1 robust standard deviations (rewind)",
        "      251  went back to step 200 (a spike at step 250); samples 400 to 479 are left out",
        "      200  continued on gpu7: 8 processes, cuda (H100), octant 0.1.0",
        "      260  hung: all-reduce (rank 3)",
        "      200  the process before was gone without a word",
        "      200  continued on gpu7: 8 processes, cuda (H100), octant 0.1.0",
        "      270  unheard: what 'of'",
        "      300  stopped on request, saved"]
    assert len([*story(events, together=False)]) == len(events) + 1


def test_lines_that_somebody_damaged_are_told_too(tmp_path: Path) -> None:
    for kind in ("start", "changed", "skip", "spike", "rewind", "end", "hang", "save"):
        append_event(tmp_path, kind, 1, {"steps": "x", "skip": 3, "optim.lr": [1], "processes": None, "z": {}})
    assert len([*story(read_events(tmp_path))]) == 8


def test_a_folder_without_a_story_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["log", str(tmp_path)]) == 2
    assert "holds no events.jsonl that says anything" in capsys.readouterr().err
