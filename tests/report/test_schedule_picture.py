"""Pictures show what the timeline says; the command prints it; the pictures in the documentation are its output."""

from __future__ import annotations

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from engine.cli import run
from engine.report.schedule_picture import schedule_grid, schedule_svg
from engine.schedules.simulate import Costs, Timeline, simulate
from engine.schedules.table import RECIPES, build_schedule, default_num_chunks

DOCS = Path(__file__).resolve().parents[2] / "docs" / "schedules.md"
SVG = "{http://www.w3.org/2000/svg}"


def timeline(name: str, p: int, m: int, costs: Costs | None = None) -> Timeline:
    return simulate(build_schedule(name, p, m, default_num_chunks(name)), costs or Costs())


def test_the_grid_has_a_row_per_rank_and_time_on_the_x_axis() -> None:
    assert schedule_grid(timeline("1f1b", 2, 3), width=80).splitlines() == [
        "rank 0 |F0 F1 ......BW0   F2 BW1   ...BW2",
        "rank 1 |...F0 BW0   F1 BW1   F2 BW2   ......",
        "        0              5              10",
        "",
        "F forward   BW backward   . idle",
    ]


def test_a_long_schedule_is_drawn_in_letters_and_bands_that_fit() -> None:
    for name in RECIPES:
        for p, m, width in ((4, 8, 60), (16, 64, 100), (2, 5, 40)):
            lines = schedule_grid(timeline(name, p, m, Costs(3, 2.9, 1.4, 0.1)), width).splitlines()[:-1]
            assert max(map(len, lines)) <= width
            rows = [line for line in lines if line.startswith("rank 0 ")]
            letters = "".join(line.split("|")[1] for line in rows)
            assert set(letters.upper()) <= set("FBW.0123456789 ")


def test_the_number_of_letters_is_the_time() -> None:
    text = schedule_grid(timeline("zb-v", 4, 8), width=100)
    row = next(line for line in text.splitlines() if line.startswith("rank 2"))
    assert {letter: row.count(letter) for letter in "FBWfbw"} == dict.fromkeys("FBWfbw", 8)
    assert "lower case: every second chunk" in text


@pytest.mark.parametrize("name", RECIPES)
def test_the_svg_has_a_bar_per_action_where_it_happens(name: str) -> None:
    drawn = timeline(name, 4, 6, Costs(2, 2, 1, 0.25))
    root = ElementTree.fromstring(schedule_svg(drawn))
    titles = [element.text for element in root.iter(f"{SVG}title")]
    assert titles == [f"{e.action}: {e.start:g} to {e.end:g}" for events in drawn.events for e in events]
    bars = [group.find(f"{SVG}rect") for group in root.iter(f"{SVG}g")]
    places = sorted((float(bar.get("y", "")), float(bar.get("x", "")), float(bar.get("width", "")))
                    for bar in bars if bar is not None)
    assert len(places) == len(titles)
    for (y, x, width), (next_y, next_x, _) in pairwise(places):
        assert next_y > y or next_x >= x + width - 0.11                      # rounding apart, no bar covers another
    text = " ".join(element.text or "" for element in root.iter(f"{SVG}text"))
    assert f"bubble {drawn.bubble:.2%}" in text and "F forward" in text and "rank 3" in text


def test_json_has_the_numbers_and_the_actions(capsys: pytest.CaptureFixture[str]) -> None:
    command = "schedule zb-h1 --stages 8 --microbatches 24 --cost-forward 18522 --cost-backward 18086 " \
              "--cost-weight 9337 --cost-comm 601 --json"
    assert run(command.split()) == 0
    result = json.loads(capsys.readouterr().out)
    assert round(result["bubble"], 4) == 0.1585
    assert result["bubble"] == pytest.approx(1 - 24 * (18522 + 18086 + 9337) / result["makespan"])
    assert result["peak_in_flight"] == [8] * 8
    assert [len(actions) for actions in result["actions"]] == [3 * 24] * 8
    assert result["actions"][7][:3] == ["7F0", "7B0", "7F1"]
    assert "0SEND_F0" in result["programs"][0] and "0REDUCE_GRAD" in result["programs"][0]


def test_the_command_draws_and_names_the_next_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "deep" / "zb-v.svg"
    assert run(["schedule", "zb-v", "--stages", "2", "--microbatches", "4", "--svg", str(picture)]) == 0
    output = capsys.readouterr().out
    assert ElementTree.parse(picture).getroot().tag == f"{SVG}svg"
    assert "zb-v: 2 stages × 2 chunks, 4 microbatches — bubble 0.00%, T = 12" in output
    assert output.splitlines()[-1].startswith("next: ")


@pytest.mark.parametrize(("arguments", "words"), [
    ("zb-v --stages 2 --microbatches 4 --chunks 3", "(it is 3)"),
    ("1f1b --stages 0 --microbatches 4", "stages = 0"),
    ("1f1b --stages 2 --microbatches 4 --cost-forward -1", "cost of forward = -1.0"),
    ("1f1b --stages 2 --microbatches 4 --svg /dev/null/x.svg", "cannot write /dev/null/x.svg"),
])
def test_a_wrong_request_ends_with_code_2(arguments: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schedule", *arguments.split()]) == 2
    assert words in capsys.readouterr().err


def test_the_pictures_in_the_documentation_are_what_the_commands_print(monkeypatch: pytest.MonkeyPatch,
                                                                       capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    blocks = re.findall(r"```\n\$ octant (schedule [^\n]*)\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert {command.split()[1] for command, _ in blocks} == set(RECIPES)
    for command, shown in blocks:
        assert run(shlex.split(command)) == 0
        printed = capsys.readouterr().out
        assert shown.strip() in printed, command
