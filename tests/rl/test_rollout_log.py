"""`rollouts.jsonl`: some texts of every step, each step once, and a prompt that comes again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from engine.distributed.mesh import Job
from engine.rl.rollout_log import PROMPTS, SAMPLES, RolloutLog
from engine.rl.rollouts import Prompt, Response, Rollouts
from tests.kit.digits import learner_of, rl_config


def step(number: int, *prompts: str, samples: int = 3) -> Rollouts:
    rows = len(prompts) * samples
    scores = np.arange(rows, dtype=np.float64)
    return Rollouts(number, tuple(Prompt(10 * number + place, (1,), text, {}) for place, text in enumerate(prompts)),
                    samples, tuple(Response((1, 2), row % 2 == 0) for row in range(rows)),
                    tuple(f"text {row}" for row in range(rows)), scores, {"f": np.where(scores == 1, np.nan, scores)})


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


def test_the_first_texts_and_prompts_that_come_again(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path, 0, print)
    log(step(1, *"abcdefg"))
    log(step(2, *"hijklmcd"))
    log.close()
    found = written(tmp_path)
    assert [(each["step"], each["prompt"]) for each in found[::SAMPLES]] == [
        *((1, text) for text in "abcdefg"[:PROMPTS]), *((2, text) for text in "hijk" + "cd")]
    assert found[1] == {"step": 1, "number": 10, "sample": 1, "prompt": "a", "response": "text 1", "score": 1.0,
                        "score/f": None, "tokens": 2, "ended": False}
    assert found[-1]["response"] == "text 22" and math.isclose(found[-1]["score/f"], 22)


def test_a_step_that_is_done_again_is_there_once(tmp_path: Path) -> None:
    for last, steps in ((0, (1, 2, 3)), (1, (2, 3))):
        log = RolloutLog(tmp_path, last, print)
        for number in steps:
            log(step(number, *("ab" if number == 1 else "xyzwb"), samples=1))
        log.close()
    assert [(each["step"], each["prompt"]) for each in written(tmp_path)] == [
        (1, "a"), (1, "b"), *((number, text) for number in (2, 3) for text in "xyzwb")]


def test_a_run_writes_them(tmp_path: Path) -> None:
    config = rl_config(tmp_path, steps=2, rollout={"prompts": 4}, ppo={"epochs": 1})
    learner = learner_of(config, Job("cpu"))
    learner.run()
    learner.close()
    found = written(tmp_path)
    assert [each["step"] for each in found] == [1] * 8 + [2] * 8
    assert all(0 <= each["score"] == each["score/places"] <= 1 and len(each["prompt"]) in (2, 3) for each in found)
