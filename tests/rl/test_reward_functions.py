"""Reward functions: what the built-in ones say, and that whatever one does wrong is defined, counted and named."""

from __future__ import annotations

import math
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from engine.config import RewardSource
from engine.errors import RequestError
from engine.rl.calling import require_functions
from engine.rl.function_scorer import MOST_IN_A_ROW, FunctionScorer
from engine.rl.functions import exact_match, gsm8k, number_in, scores_in
from engine.rl.rollouts import Prompt, Response, Rollouts
from tests.kit.distributed import run_distributed

FUNCTIONS = '''
import os, re, sys, time

def length(prompts, responses, records):
    print("this is no answer")
    return [len(response) + record["bonus"] for response, record in zip(responses, records)]

def moody(prompts, responses, records):
    """Does what a response says."""
    for response in responses:
        if response == "raise":
            raise KeyError("mood")
        if response == "hang":
            time.sleep(60)
        if response == "lock":
            re.match("(a+)+b", "a" * 60)
        if response == "die":
            os._exit(9)
        if response == "leave":
            sys.exit()
    return [{"nan": float("nan"), "inf": float("inf"), "none": None}.get(response, 1.0) for response in responses]

def one_too_many(prompts, responses, records):
    return [0.0] * (len(responses) + 1)

def words(prompts, responses, records):
    return ["good"] * len(responses)

def forgets(prompts, responses, records):
    pass

def two(prompts, responses):
    return [0.0] * len(responses)

a_number = 7
'''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rollouts(*texts: str, samples: int = 1) -> Rollouts:
    prompts = tuple(Prompt(100 + number, (1,), f"prompt {number}", {"bonus": number})
                    for number in range(len(texts) // samples))
    return Rollouts(7, prompts, samples, tuple(Response((1,), True) for _ in texts), texts)


class Asking:
    """A scorer of `rewards.py`."""

    def __init__(self, function: str, **settings: Any) -> None:
        self.scorer = FunctionScorer(RewardSource(function=f"rewards:{function}", **settings), None)

    def __enter__(self) -> Asking:
        return self

    def __exit__(self, *_: object) -> None:
        self.scorer.close()


def test_exact_match() -> None:
    assert exact_match(["", ""], [" 123\n", "132"], [{"answer": "123"}, {"answer": "123"}]) == [1.0, 0.0]
    assert exact_match([""], ["7"], [{"answer": 7}]) == [1.0]
    with pytest.raises(ValueError, match="answer of the record is missing"):
        exact_match([""], ["7"], [{"solution": "7"}])


@pytest.mark.parametrize(("response", "answer", "score"), [
    ("so 6 × 7 = 42\n#### 42", "thus\n#### 42", 1), ("#### 42", "42", 1), ("#### 42", 42, 1), ("42", "42", 0),
    ("#### 1,234", "#### 1234", 1), ("#### 1234.0", "#### 1,234", 1), ("#### $1,234.50", "#### 1234.5", 1),
    ("#### -5", "#### 5", 0), ("#### −5", "#### -5", 1), ("#### $-5", "#### -5", 1), ("#### -$5", "#### -5", 1),
    ("#### +5", "#### 5", 1), ("#### .5", "#### 0.50", 1), ("#### 18 dollars.", "#### 18", 1), ("####42.", "42", 1),
    ("#### 3 #### 4", "#### 4", 1), ("#### 4 #### 3", "#### 4", 0), ("#### none", "#### 4", 0), ("####", "4", 0),
    ("", "4", 0), ("#### 50%", "50", 1), ("#### 3, 4", "3", 1), ("#### 1e3", "1", 1)])
def test_gsm8k(response: str, answer: object, score: float) -> None:
    assert gsm8k([""], [response], [{"answer": answer}]) == [score]


def test_an_answer_without_a_number_is_no_zero() -> None:
    with pytest.raises(ValueError, match="no number in the answer 'many'"):
        gsm8k([""], ["#### 4"], [{"answer": "many"}])
    assert number_in(" 0.10") == number_in(".1") is not None and number_in("") is None


def test_what_counts_as_scores() -> None:
    found = scores_in(np.array([1, 2], np.int32), 2)
    assert found == [1.0, 2.0] and math.isnan(scores_in([None], 1)[0])
    assert scores_in([True, 10**400], 2) == [1, math.inf]
    for wrong, why in ((3.0, "not a list"), ({0: 1.0}, "not a list"), ([1.0, 2.0], "2 numbers for 1"), (["1"], "'1'")):
        with pytest.raises(ValueError, match=why):
            scores_in(wrong, 1)


@pytest.mark.parametrize("workers", [1, 3])
def test_every_text_gets_its_own_score(workers: int) -> None:
    texts = ["a" * (i % 5) for i in range(80)]
    with Asking("length", workers=workers) as asking:
        for _ in range(2):
            found = asking.scorer(rollouts(*texts, samples=2)).tolist()
            assert found == [len(text) + row // 2 for row, text in enumerate(texts)]
        assert not asking.scorer.complaints


@pytest.mark.parametrize(("bad", "why"), [
    ("raise", r"raises KeyError: 'mood' \(.*rewards.py, line 1\d\)"), ("hang", "took longer than 0.5 s"),
    ("lock", "took longer than 0.5 s"), ("die", r"ended its process \(exit code 9\)"), ("leave", "raises SystemExit"),
    ("nan", "returned nan"), ("inf", "returned inf"), ("none", "returned nan")])
def test_a_text_that_cannot_be_scored_is_named_and_costs_no_other(bad: str, why: str) -> None:
    with Asking("moody", timeout_seconds=0.5 if bad in ("hang", "lock") else 20) as asking:
        found = asking.scorer(rollouts("fine", "fine", "fine", bad, samples=2))
        np.testing.assert_array_equal(found, [1, 1, 1, np.nan])
        [said] = asking.scorer.complaints
        assert said.startswith("reward function rewards:moody: prompt 101, sample 1, of step 7 has no score")
        assert re.search(why, said)
        assert asking.scorer(rollouts("fine")).tolist() == [1]                         # perhaps by a new worker


@pytest.mark.parametrize(("function", "why"), [
    ("one_too_many", "prompt 100, sample 0, of step 7: it returned 3 numbers for 2 texts"),
    ("words", "it returned 'good' for a text, not a number"), ("forgets", "it returned None for 2 texts")])
def test_what_every_call_would_do_wrong_is_refused(function: str, why: str) -> None:
    with Asking(function) as asking, pytest.raises(RequestError, match=why):
        asking.scorer(rollouts("a", "b"))


def test_a_step_without_any_score_is_refused_with_what_the_function_says() -> None:
    with Asking("moody") as asking, pytest.raises(RequestError, match=r"not one of the 2 texts .* raises KeyError"):
        asking.scorer(rollouts("raise", "raise"))


def test_a_function_that_always_hangs_ends_the_run_soon() -> None:
    with Asking("moody", timeout_seconds=0.2) as asking:
        started = time.monotonic()
        with pytest.raises(RequestError, match=f"took longer than 0.2 s, as {MOST_IN_A_ROW} calls in a row did"):
            asking.scorer(rollouts(*["hang"] * 100))
        assert time.monotonic() - started < 60


def test_several_hundred_bad_texts_are_a_few_lines() -> None:
    with Asking("moody") as asking:
        asking.scorer(rollouts("fine", *["nan"] * 300))
        said = asking.scorer.complaints
        assert len(said) == 4 and "300 texts of step 7 have no score" in said[-1]


@pytest.mark.parametrize(("function", "why"), [
    ("gsm9k", "there is exact_match, gsm8k, or module:function"), ("nowhere:f", "raises ModuleNotFoundError"),
    ("broken:f", "importing broken raises ModuleNotFoundError: No module named 'nothing_of_this_name'"),
    ("rewards:f", "has no f"), ("rewards:a_number", "is 7, not a function"),
    ("rewards:two", "too many positional arguments"), ("os.path;rm:f", "there is exact_match")])
def test_functions_are_imported_before_the_job_starts(function: str, why: str) -> None:
    with pytest.raises(RequestError, match=why) as caught:
        require_functions([RewardSource(function=function)])
    assert str(caught.value).startswith(f"roles.reward: function {function}: ") and caught.value.exit_code == 2


def test_functions_that_are_there_pass() -> None:
    require_functions([RewardSource(function="exact_match"), RewardSource(function="rewards:length"),
                       RewardSource(load="somewhere")])


def test_a_worker_ends_with_its_parent(folder: Path) -> None:
    with Asking("length") as asking:
        asking.scorer(rollouts("a"))
        [worker] = asking.scorer._workers
        assert worker._process is not None and worker._process.stdin is not None
        worker._process.stdin.close()                            # what the end of a killed parent does
        assert worker._process.wait(10) == 0


def _on_each_rank(folder: str) -> list[Any]:
    before = Path.cwd()
    os.chdir(folder)
    scorer = FunctionScorer(RewardSource(function="rewards:moody"), dist.group.WORLD)
    found: list[Any] = [*scorer(rollouts("fine", "raise")).tolist(), *scorer.complaints]
    try:
        scorer(rollouts("raise"))
    except RequestError as error:
        found.append(str(error))
    scorer.close()
    os.chdir(before)
    return found


def test_all_ranks_hear_the_same(folder: Path) -> None:
    first, second = run_distributed(_on_each_rank, 2, str(folder))
    assert str(first) == str(second) and first[0] == 1.0 and math.isnan(first[1]) and "not one of the 1" in first[3]

