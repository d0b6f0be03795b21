"""`octant report`: what the page says, and what it refuses."""

from __future__ import annotations

import argparse
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from engine.commands import report as command
from engine.config import load_config
from engine.errors import RequestError
from engine.report.page import charts, facts, stage_contents
from engine.report.runs import read_metrics, read_run
from tests.kit.run_folder import write_run


def report(*run_dirs: Path) -> str:
    assert command.run(argparse.Namespace(run_dir=[str(path) for path in run_dirs])) == 0
    return (run_dirs[0] / ("report.html" if len(run_dirs) == 1 else "comparison.html")).read_text()


class Page(HTMLParser):
    """Collects what a page refers to, and checks that its tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_needs_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run")
    page = Page(report(tmp_path / "run"))
    assert page.open == [] and page.links == [] and "script" not in page.tags
    assert {path.name for path in (tmp_path / "run" / "report").iterdir()} == {
        f"{name}.svg" for name in ("loss", "grad_norm", "lr", "tokens_per_second", "step_seconds", "memory_bytes",
                                   "layout")}
    assert capsys.readouterr().out.splitlines()[-1].startswith("next: ")


def test_facts_of_a_run(tmp_path: Path) -> None:
    records = write_run(tmp_path / "run")
    found = facts(read_run(tmp_path / "run"))
    assert found["Progress"] == "step 40 of 100"
    assert found["Loss"] == f"{records[0]['loss']:.4f} → {records[-1]['loss']:.4f}"
    assert found["Validation loss"] == "2.5000 at step 40"
    assert found["Tokens"] == "20.48k (320 samples)"
    assert found["Throughput"] == "1,024 tokens/s, 0.5 s a step (medians)"      # the slow first step does not count
    assert found["Utilisation"] == "0.25 TFLOP/s per device, MFU n/a (causal)"
    assert found["Peak memory"] == "3.00 GiB on rank 0"
    assert found["Skipped updates"] == "1"
    assert found["Layout"].startswith("tensor 2 × pipeline 2 × data 2 = 8 ranks; 1f1b")
    assert found["Batch"] == "8 sequences × 64 tokens = 512 tokens a step (micro 1)"


def test_charts_hold_the_records(tmp_path: Path) -> None:
    records = write_run(tmp_path / "run")
    drawn = charts([read_run(tmp_path / "run")])
    loss, validation = drawn["loss"].series
    assert list(loss.points) == [(r["step"], r["loss"]) for r in records]
    assert list(validation.points) == [(20, 2.5), (40, 2.5)]
    assert drawn["loss"].marks == [7]
    assert drawn["grad_norm"].log                            # from 201 to 6
    assert drawn["memory_bytes"].series[0].points[0][1] == 3.0


def test_long_run_shows_its_values_behind_their_median(tmp_path: Path) -> None:
    write_run(tmp_path / "run", num_steps=500)
    faint, median, _ = charts([read_run(tmp_path / "run")])["loss"].series
    assert (faint.style, median.style) == ("faint", "line")
    assert len(faint.points) == len(median.points) == 500


def test_run_without_validation_memory_or_mfu_is_reported(tmp_path: Path) -> None:
    write_run(tmp_path / "run", num_steps=1)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n')
    assert "not evaluated" in report(tmp_path / "run")


def test_several_runs_share_axes_and_table(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", num_steps=30, overrides=("run.name=<second & last>", "parallel.tensor=1"), every=3)
    page = report(tmp_path / "a", tmp_path / "b")
    assert Page(page).open == []
    assert "&lt;second &amp; last&gt;" in page and "<second" not in page
    assert "tensor 2 × pipeline 2 × data 2 = 8 ranks" in page and "tensor 1 × pipeline 2 × data 2 = 4 ranks" in page
    assert not (tmp_path / "a" / "report.html").exists()


@pytest.mark.parametrize(("overrides", "contents"), [
    (("parallel.pipeline=1",), [["layers 0–3", "embedding + LM head"]]),
    (("parallel.pipeline=2",), [["layers 0–1", "embedding"], ["layers 2–3", "LM head"]]),
    (("parallel.pipeline=2", "parallel.schedule=interleaved", "parallel.virtual_stages=2"),
     [["layers 0, 2", "embedding"], ["layers 1, 3", "LM head"]]),
    (("parallel.pipeline=2", "parallel.schedule=zb-v", "parallel.virtual_stages=2"),
     [["layers 0, 3", "embedding + LM head"], ["layers 1, 2"]]),
])
def test_layers_of_each_stage(tmp_path: Path, overrides: tuple[str, ...], contents: list[list[str]]) -> None:
    write_run(tmp_path / "run", overrides=overrides)
    assert stage_contents(load_config(tmp_path / "run" / "config.yaml")) == contents


def test_line_being_written_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "run", num_steps=3)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize(("text", "message"), [
    ("", "no record yet"),
    ("garbage", "no record yet"),
    ('{"step": 1}\ngarbage\n{"step": 3}\n', "line 2"),
    ('{"step": 1}\n\n{"step": 3}\n', "line 2"),
    ('{"loss": 1}\n', "line 1"),
    ('[1, 2]\n', "line 1"),
    ('{"step": 1, "loss": NaN}\n', "loss"),
    ('{"step": 1, "loss": "low"}\n', "'low'"),
    ('{"step": 2}\n{"step": 2}\n', "step 2 comes after step 2"),
    ("\x00\x00\x00\n", "line 1"),
])
def test_empty_or_damaged_metrics_are_refused(tmp_path: Path, text: str, message: str) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text(text)
    with pytest.raises(RequestError, match=message) as error:
        report(tmp_path / "run")
    assert error.value.exit_code == 2
    assert not (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("missing", ["metrics.jsonl", "config.yaml"])
def test_folder_that_is_no_run_is_refused(tmp_path: Path, missing: str) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "run" / missing).unlink()
    with pytest.raises(RequestError, match=missing):
        report(tmp_path / "run")
    with pytest.raises(RequestError, match="nowhere is not a folder"):
        report(tmp_path / "nowhere")


def test_page_of_every_record_key_survives_json(tmp_path: Path) -> None:
    """Records of other objectives carry other numbers: they are read, and do not disturb."""
    write_run(tmp_path / "run", num_steps=2)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "reward": 0.5, "clipfrac": None}) + "\n")
    assert "step 3 of 100" in report(tmp_path / "run")
