"""The page of a run that learns from its own texts: its charts, and the same prompts over time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.distributed.mesh import Job
from engine.errors import DataError
from engine.report.page import write_report
from engine.report.rl_charts import PANELS
from engine.report.rollout_texts import PROMPTS, TIMES, over_time, read_rollouts, texts_section
from engine.report.run_charts import charts
from engine.report.runs import read_run
from tests.kit.digits import learner_of, rl_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps, as it was trained."""
    folder = tmp_path_factory.mktemp("rl") / "run"
    folder.mkdir()
    config = rl_config(folder, steps=3, rollout={"prompts": 4}, ppo={"epochs": 1})
    (folder / "config.yaml").write_text(config.dump())
    learner = learner_of(config, Job("cpu"))
    learner.run()
    learner.close()
    return folder


def test_every_panel_has_its_numbers(folder: Path) -> None:
    drawn = charts([read_run(folder)])
    assert PANELS.keys() <= drawn.keys() | {"rollout_probs_diff"}
    assert [series.label for series in drawn["clip_fraction"].series] == ["policy", "value"]
    assert len(drawn["value_error"].series[0].points) == 3


def test_the_page_has_charts_and_texts(folder: Path) -> None:
    page, *pictures = write_report([read_run(folder)], folder / "report.html", folder / "report")
    text = page.read_text()
    assert "Divergence from the reference" in text and "Texts over time" in text and "<th>response</th>" in text
    assert {"score.svg", "divergence.svg", "entropy.svg", "value_error.svg"} <= {path.name for path in pictures}


def test_two_runs_share_the_charts(folder: Path) -> None:
    run = read_run(folder)
    drawn = charts([run, run])
    assert [series.label for series in drawn["clip_fraction"].series] == ["run", "run"]
    write_report([run, run], folder / "comparison.html", folder / "comparison")
    assert "Texts over time" not in (folder / "comparison.html").read_text()


def test_other_runs_have_no_such_charts(folder: Path) -> None:
    run = read_run(folder)
    records = [{key: value for key, value in each.items() if "/" not in key} for each in run.records]
    assert not PANELS.keys() & charts([type(run)(run.name, folder / "none", run.config, records)]).keys()
    assert texts_section(folder / "none") == ""


def texts(step: int, *prompts: str) -> list[dict[str, Any]]:
    return [{"step": step, "prompt": prompt, "response": f"{prompt} {step} {sample}", "score": 0.5}
            for prompt in prompts for sample in range(2)]


def test_the_prompts_that_came_most_often_are_shown_evenly_over_time() -> None:
    steps = (texts(step, f"once {step}", "often", *"ab"[: step % 2]) for step in range(1, 40))
    found = over_time([each for step in steps for each in step])
    assert [*found][:2] == ["often", "a"] and len(found) == PROMPTS
    assert [text["response"] for text in found["often"]] == [f"often {step} 0" for step in (1, 7, 14, 20, 26, 33, 39)]
    assert len(found["often"]) == TIMES


def test_texts_are_shown_as_they_are(tmp_path: Path) -> None:
    bad = {"step": 1, "prompt": "<script>", "response": "a\n<b>" + "x" * 2000, "score": None}
    (tmp_path / "rollouts.jsonl").write_text(json.dumps(bad) + "\n" + '{"step": 2, "pro')
    found = texts_section(tmp_path)
    assert "&lt;script&gt;" in found and "a<br>&lt;b&gt;" in found and len(found) < 2000 and "<td>–</td>" in found


@pytest.mark.parametrize("line", ["{", "[]", '{"step": 1, "prompt": "a"}',
                                  '{"step": "1", "prompt": "a", "response": ""}',
                                  '{"step": true, "prompt": "a", "response": ""}'])
def test_a_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "rollouts.jsonl").write_text("\n".join([json.dumps(texts(1, "a")[0]), line, ""]))
    with pytest.raises(DataError, match=r"rollouts.jsonl, line 2 is not a text of a step"):
        read_rollouts(tmp_path / "rollouts.jsonl")
