"""`octant report`: what the page says, and what it refuses."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
from datetime import datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest

from engine import cli
from engine.commands import report as command
from engine.config import load_config
from engine.errors import RequestError
from engine.report.charts import _axes, line_chart
from engine.report.facts import facts
from engine.report.layout import schedule_picture, stage_contents
from engine.report.run_charts import charts
from engine.report.runs import read_metrics, read_run
from tests.kit.run_folder import write_run


def report(*run_dirs: Path) -> str:
    assert command.run(argparse.Namespace(run_dir=[str(path) for path in run_dirs], output=None, watch=None)) == 0
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
                                   "layout", "schedule")}
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


def test_a_spike_does_not_flatten_the_norm(tmp_path: Path) -> None:
    """The axis covers what is usual; the legend says what lies off it, and the loss's own axis does so as well."""
    records = write_run(tmp_path / "run", num_steps=100)
    for record in records:
        record["grad_norm"] = 1.0 + 0.1 * (record["step"] % 3)
    records[60]["grad_norm"], records[61]["loss"] = 5e7, 900.0
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    drawn = charts([read_run(tmp_path / "run")])
    assert not drawn["grad_norm"].log
    for name, highest in (("grad_norm", 2.0), ("loss", 40.0)):
        assert _axes(drawn[name])[1].high < highest
        assert "1 point off the scale, up to " in line_chart(drawn[name])
    for record in records[:30]:
        record["grad_norm"] = 200.0 / record["step"]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    norm = charts([read_run(tmp_path / "run")])["grad_norm"]
    assert norm.log and 200 < _axes(norm)[1].high < 50_000 and "up to 50M" in line_chart(norm)


def test_where_when_and_with_what(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    found = facts(read_run(tmp_path / "run"))
    assert (found["Started"], found["Software"]) == ("n/a", "n/a")           # a run of before there were events
    assert found["Duration"] == "28 s in steps"                              # 9 s, and 39 times 0.5 s
    begin = datetime.now().astimezone() - timedelta(hours=3, minutes=5)
    for hours, host in ((0, "gpu007"), (1, "gpu008")):
        detail = {"host": host, "octant": "0.1.0", "commit": "abc123", "python": "3.11.7", "device": "cuda (H100)"}
        event = {"time": (begin + timedelta(hours=hours)).isoformat(), "kind": "start", "step": 0, "rank": 0,
                 "detail": detail}
        with (tmp_path / "run" / "events.jsonl").open("a") as file:
            file.write(json.dumps(event) + '\n{"kind": "half a li\n[]\n')
    found = facts(read_run(tmp_path / "run"))
    assert found["Started"] == f"{begin:%Y-%m-%d %H:%M} on gpu007, gpu008, cuda (H100); started again 1 time"
    assert found["Duration"] == "3 h 05 min, 28 s in steps"
    assert found["Software"] == "Octant 0.1.0, commit abc123, Python 3.11.7"


def test_the_pipeline_is_drawn(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    page = report(tmp_path / "run")
    assert "<h2>Pipeline</h2>" in page and "1f1b: 2 stages, 4 microbatches" in page
    few, note = schedule_picture(load_config(tmp_path / "run" / "config.yaml", ["batch.global=128"])) or ("", "")
    assert "1f1b: 2 stages, 8 microbatches" in few and "Drawn with 8 of the step's 64 microbatches" in note
    assert schedule_picture(load_config(tmp_path / "run" / "config.yaml", ["parallel.pipeline=1"])) is None
    assert page.count("<style>") == 1                                # a picture's own would hold for the whole page
    assert (tmp_path / "run" / "report" / "schedule.svg").read_text().count("<style>") == 1


def test_letters_stay_readable_on_a_phone(tmp_path: Path) -> None:
    """Every chart is there a second time, no wider than the screen; what is wider scrolls by itself."""
    write_run(tmp_path / "run")
    page = report(tmp_path / "run")
    assert page.count('class="desk"') == page.count('class="phone"') == 6
    for width in re.findall(r'class="phone"><svg class="chart"[^>]*viewBox="0 0 (\d+)', page):
        assert int(width) <= 350
    assert '<meta name="viewport" content="width=device-width' in page and "@media (max-width: 600px)" in page
    identifiers = re.findall(r' id="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))


def octant(*words: object) -> int:
    return cli.run(["report", *map(str, words)])


def test_the_page_goes_where_it_is_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run")
    assert octant(tmp_path / "run", "--output", tmp_path / "new" / "mine.html") == 0
    assert (tmp_path / "new" / "mine.html").is_file() and (tmp_path / "new" / "mine" / "loss.svg").is_file()
    assert octant("--output", tmp_path / "folder", tmp_path / "run") == 0
    assert (tmp_path / "folder" / "report.html").is_file() and not (tmp_path / "run" / "report.html").exists()
    (tmp_path / "run" / "report").write_text("in the way")
    assert octant(tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "--output names another place" in said and "Traceback" not in said


def test_watching_writes_again_until_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    """From before the first record on; the page loads itself again while the run goes on, and no more at the end."""
    run = tmp_path / "run"
    records = write_run(run, num_steps=100)
    lines = [json.dumps(record) + "\n" for record in records]
    (run / "metrics.jsonl").unlink()
    growth = iter(["", "".join(lines[:10]), "".join(lines[:10]) + lines[10][:20], "".join(lines)])
    pages: list[str] = []

    def sleep(seconds: float) -> None:
        assert seconds == 7
        pages.append((run / "report.html").read_text() if (run / "report.html").exists() else "")
        (run / "metrics.jsonl").write_text(next(growth))

    monkeypatch.setattr("engine.report.watch.time.sleep", sleep)
    assert octant(run, "--watch", 7) == 0
    assert [("step 10 of 100" in page, '<meta http-equiv="refresh" content="7">' in page) for page in pages] \
        == [(False, False), (False, False), (True, True), (True, True)]
    final = (run / "report.html").read_text()
    assert "step 100 of 100 (done)" in final and "refresh" not in final
    assert "report.html: step 10 of 100" in capsys.readouterr().out


def test_watching_ends_with_ctrl_c_and_follows_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run")

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.report.watch.time.sleep", interrupted)
    assert octant(tmp_path / "run", "--watch", 1) == 0
    assert "refresh" not in (tmp_path / "run" / "report.html").read_text()
    for words in ((tmp_path / "run", tmp_path / "run", "--watch", 5), (tmp_path / "run", "--watch", 0)):
        assert octant(*words) == 2
    assert octant(tmp_path / "nowhere", "--watch", 5) == 2
    assert "it follows one run" in capsys.readouterr().err


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


def test_a_run_that_may_only_be_read_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(path: Path, data: bytes) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    write_run(tmp_path / "run")
    monkeypatch.setattr("engine.writing.write_whole", read_only)
    with pytest.raises(RequestError, match=r"cannot write .*Read-only file system; --output names") as caught:
        report(tmp_path / "run")
    assert caught.value.exit_code == 2 and not (tmp_path / "run" / "report.html").exists()
