"""`octant demo align`, shortened: its stages run one after the other, and say what they saw."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import random
import re
from itertools import combinations, islice
from pathlib import Path

import pytest

from corpus_tools import digits
from engine import cli
from engine.commands import _demo_align as command
from engine.hints import hint


def run_here(*arguments: str, into: Path | None = None) -> None:
    """As `octant` of the stages, without processes."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.run(arguments) == 0
    if into is not None:
        into.write_text(printed.getvalue(), encoding="utf-8")


def test_all_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    short = {stage: re.sub(r"every: \d+, batches: \d+", "every: 1, batches: 1", re.sub(r"steps: \d+", "steps: 2", text))
             for stage, text in command.STAGES.items()}
    for name, value in (("STAGES", short), ("RECORDS", dict.fromkeys(command.RECORDS, 200)), ("NUM_PROMPTS", 4),
                        ("BEST_OF", 4), ("octant", run_here)):
        monkeypatch.setattr(command, name, value)
    folder = tmp_path / "demo"
    assert command.run(folder, 1) == 0
    said = capsys.readouterr().out
    assert re.search(r"^dpo +loss \d\.\d+ → ", said, re.MULTILINE) and "best of 1: " in said
    for stage in ("ppo", "grpo"):
        assert re.search(rf"^{stage} +\d+% → \d+% of a step's answers right; of those to held-out prompts \d+%$", said,
                         re.MULTILINE)
    assert said.splitlines()[-1] == hint("data", "preview", f"{folder}/sft.yaml", "--samples", "0:2",
                                         why="what sft saw, in colour")
    assert {path.name for path in folder.iterdir()} <= command.OURS
    page = (folder / "comparison.html").read_text(encoding="utf-8")
    assert all(title in page for title in ("Pairs in the right order", "By how much", "how sure the reward model is",
                                            "Divergence from the reference", "Score"))
    learning = (folder / "learning.svg").read_text(encoding="utf-8")
    assert "Right answers of a step" in learning and ">ppo<" in learning and ">grpo<" in learning
    assert "1 − 2^−N" in (folder / "best-of-n.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("number", [1, 2, 3, 6])
def test_the_best_of_some_is_the_mean_over_all_draws(number: int) -> None:
    right = [True, False, True, True, False, False]
    draws = [*combinations(range(6), number)]
    want = sum(right[min(draw)] for draw in draws) / len(draws)
    assert command.expected_best(right, number) == pytest.approx(want)


def test_demonstrations_are_as_uncertain_as_they_are_said_to_be() -> None:
    """Counted: the right answer every second time, else each of five others alike."""
    assert digits.DEMONSTRATED == pytest.approx(-(0.5 * math.log(0.5) + 5 * 0.1 * math.log(0.1)) / 7)
    [prompt] = islice(digits.prompts(3), 1)
    seen = [each["completion"] for each in digits.demonstrations(itertools.repeat(prompt, 4000))]
    assert seen.count(digits.answer(prompt)) / 4000 == pytest.approx(0.5, abs=0.03)
    assert {seen.count(wrong) / 4000 > 0.07 for wrong in {*seen} - {digits.answer(prompt)}} == {True}
    assert len({*seen}) == 6 and not digits.is_right(prompt, digits.mistake(prompt, random.Random(0)))
    assert len({*islice(digits.prompts(), 5000)}) == 5000
