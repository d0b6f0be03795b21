"""`profile`: a trace of the steps that were asked for, with phases and actions under their names."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from engine.config import Config
from engine.config.phases import OF_CORPORA
from engine.distributed.mesh import single_mesh
from engine.errors import RequestError
from engine.train.corpora import Corpora
from engine.train.loop import Trainer
from tests.kit.runs import run_config, train


def names_in(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [event["name"] for event in json.load(file)["traceEvents"] if "name" in event]


def traces(config: Config) -> list[str]:
    return sorted(path.name for path in (Path(config.run.dir) / "profile").glob("*"))


def test_a_trace_of_some_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config(tmp_path, "run", steps=5, profile={"steps": [2, 4]}, checkpoint={"every": 3})
    train(config)
    assert traces(config) == ["rank-00000-steps-2-3.json.gz"]
    names = names_in(Path(config.run.dir) / "profile" / "rank-00000-steps-2-3.json.gz")
    for phase in OF_CORPORA.in_step:
        assert names.count(phase) == 2, phase
    assert [names.count(f"0F{m}") for m in range(4)] == [3, 3, 3, 3], "two steps and an evaluation"
    assert names.count("evaluate") == 1, "what is done after the last of these steps is in the trace"


def test_on_the_ranks_that_were_asked_for_up_to_the_end_of_the_run(tmp_path: Path) -> None:
    config = run_config(tmp_path, "run", steps=2, profile={"steps": [2, 90], "ranks": [1]}, parallel={"data": 2})
    train(config)
    assert traces(config) == ["rank-00001-steps-2-89.json.gz"]
    assert names_in(Path(config.run.dir) / "profile" / traces(config)[0]).count("update") == 1


@pytest.mark.parametrize("profile", [{}, {"steps": [7, 9]}, {"memory": True}], ids=str)
def test_nothing_is_written_where_no_step_is_asked_for(tmp_path: Path, profile: dict[str, Any]) -> None:
    config = run_config(tmp_path, "run", steps=2, profile=profile)
    train(config)
    assert traces(config) == []


def test_what_cannot_be_recorded_is_refused(tmp_path: Path) -> None:
    config = run_config(tmp_path, "run", profile={"steps": [1, 2], "memory": True})
    with pytest.raises(RequestError, match="snapshot of a GPU's memory, and this run is on cpu"):
        Trainer.start(config, single_mesh(), Corpora.open(config), lambda: False)
    with pytest.raises(ValidationError, match="hold no step"):
        run_config(tmp_path, "run", profile={"steps": [5, 5]})


def test_a_trace_that_cannot_be_written_costs_nothing_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = run_config(tmp_path, "run", steps=3, profile={"steps": [1, 2]})
    Path(config.run.dir).mkdir()
    (Path(config.run.dir) / "profile").write_text("in the way")
    trainer = Trainer.start(config, single_mesh(), Corpora.open(config), lambda: False)
    assert trainer.run()
    trainer.close()
    assert "the profile could not be written: " in capfd.readouterr().out
