"""What is wrong is said, with its numbers; what means nothing changes nothing; nothing hangs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from engine.config import Config
from engine.distributed.mesh import Job
from engine.errors import CheckpointError, ConfigError, RequestError, WorkerError
from engine.rl.experience import LOG_PROBS, REFERENCE, VALUES, gather
from engine.rl.rollouts import Prompt, Response, Rollouts
from engine.rl.start import start
from tests.kit.digits import END, NUM_IDS, Digits, Places, learner_of, rl_config

QUICK: dict[str, Any] = {"steps": 1, "rollout": {"prompts": 4}, "ppo": {"epochs": 1}}


def numbers(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]


@dataclass(frozen=True)
class Says(Places):
    """Scores as they are."""

    scores: tuple[float, ...] = ()

    def __call__(self, rollouts: Rollouts) -> Any:
        return np.array(self.scores)


def scored(config: Config, *scores: float) -> list[dict[str, Any]]:
    """A run of a step whose texts have these scores."""
    learner = start(config, Job("cpu"), Digits(), [Says(scores=scores)], NUM_IDS, {END}, lambda: False)
    try:
        learner.run()
    finally:
        learner.close()
    return numbers(config)


def test_scores_of_the_wrong_count_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="gave 3 scores for 8 texts"):
        scored(rl_config(tmp_path, **QUICK), 1.0, 2.0, 3.0)


def test_scores_that_are_no_numbers_count_nothing_and_are_counted(tmp_path: Path) -> None:
    [row] = scored(rl_config(tmp_path, **QUICK), *[float("nan")] * 3, *[1.0] * 5)
    assert row["scores_not_finite"] == 3 and row["critic/score/mean"] == pytest.approx(5 / 8)
    assert np.isfinite([row["actor/pg_loss"], row["critic/vf_loss"]]).all()


@dataclass(frozen=True)
class Long(Digits):
    """One prompt is longer than there is room for."""

    def prompt(self, number: int) -> Prompt:
        return Prompt(number, (1,) * (5 if number == 3 else 4), "", {})


def test_a_prompt_that_leaves_no_room_is_named(tmp_path: Path) -> None:
    learner = learner_of(rl_config(tmp_path, **QUICK), Job("cpu"), source=Long())
    with pytest.raises(RequestError, match=r"prompt 3 has 5 tokens; with data.seq_len\(8\) and rollout.max_new_tokens"
                                           r"\(4\) it takes 1 to 4"):
        learner.run()
    learner.close()


@dataclass(frozen=True)
class Same(Places):
    """Everything is equally good."""

    def __call__(self, rollouts: Rollouts) -> Any:
        return np.ones(rollouts.num_rows)


def run(config: Config, scorer: Places | None = None) -> tuple[list[dict[str, Any]], float]:
    """Records, and by how much the actor's weights moved."""
    learner = start(config, Job("cpu"), Digits(), [scorer or Places()], NUM_IDS, {END}, lambda: False)
    before = [piece.tensor.clone() for piece in learner.state.model_pieces()]
    try:
        learner.run()
    finally:
        learner.close()
    moved = max(float((piece.tensor - old).abs().max())
                for piece, old in zip(learner.state.model_pieces(), before, strict=True))
    return numbers(config), moved


def test_groups_of_one_score_teach_nothing(tmp_path: Path) -> None:
    config = rl_config(tmp_path, run={"objective": "grpo"}, **QUICK | {"grpo": {"epochs": 1, "dynamic_sampling": 2}})
    [row], moved = run(config, Same())
    assert row["groups_without_signal"] == 1 and row["groups_refilled"] == 8 and moved == 0.0
    assert row["consumed_samples"] == 12                                       # two more rounds of four prompts


def test_groups_without_signal_are_replaced(tmp_path: Path) -> None:
    config = rl_config(tmp_path, run={"objective": "grpo"}, **QUICK | {"grpo": {"epochs": 1, "dynamic_sampling": 20}})
    [row], moved = run(config)
    assert row["groups_without_signal"] == 0 < row["groups_refilled"] and moved > 0
    assert row["consumed_samples"] == 4 + row["groups_refilled"]


def test_a_minibatch_without_a_token_changes_nothing(tmp_path: Path) -> None:
    """Texts that came to no end are not learned from, and none of them did."""
    config = rl_config(tmp_path, **QUICK | {"rollout": {"prompts": 4, "max_new_tokens": 1, "mask_truncated": True},
                                            "ppo": {"epochs": 1, "minibatch": 2}, "steps": 3,
                                            "reliability": {"watchdog": None, "max_skips": 0}})
    found, moved = run(config)
    empty = [row for row in found if row["actor/updates"] == 0]
    assert empty and all(row["skipped"] for row in empty)
    if all(row["actor/updates"] == 0 for row in found):
        assert moved == 0.0


def test_a_run_in_which_nothing_is_learned_gives_up(tmp_path: Path) -> None:
    config = rl_config(tmp_path, steps=9, rollout={"prompts": 4, "max_new_tokens": 1, "mask_truncated": True},
                       ppo={"epochs": 1}, reliability={"watchdog": None, "max_skips": 1},
                       data={"seq_len": 8}, run={"seed": 8})
    with pytest.raises(WorkerError, match="steps in a row had not one token to learn from"):
        run(config)


def test_actor_and_critic_must_share_a_tokenizer(tmp_path: Path) -> None:
    first = rl_config(tmp_path / "first", **QUICK)

    @dataclass(frozen=True)
    class Named(Digits):
        name: str = ""

        def fingerprint(self) -> dict[str, Any]:
            return {**super().fingerprint(), "tokenizer": self.name, "end_of_document": END}

    learner = learner_of(first, Job("cpu"), source=Named(name="one"))
    learner.run()
    learner.close()
    other = rl_config(tmp_path / "other", **QUICK, roles={"critic": {"load": str(tmp_path / "first")}})
    with pytest.raises(CheckpointError, match=r"roles.critic: .*another tokenizer"):
        learner_of(other, Job("cpu"), source=Named(name="two"))
    learner_of(other, Job("cpu"), source=Named(name="one")).close()


@pytest.mark.parametrize(("sections", "message"), [
    ({"roles": {"critic": {"ranks": "2:4", "parallel": {"tensor": 4}}}}, "roles.critic: tensor.4. .* world size 2"),
    ({"parallel": {"tensor": 2}, "roles": {"actor": {"generate": {"tensor": 3}}}}, "roles.actor.generate: tensor.3."),
    ({"roles": {"actor": {"ranks": "0:1"}, "critic": {"ranks": "2:3"}}}, "no role lives on rank 1"),
    ({"rollout": {"async_steps": 1}}, "on ranks of its own: name them in roles.rollout"),
    ({"rollout": {"async_steps": 1}, "roles": {"actor": {"ranks": "1:2"}, "rollout": {"ranks": "0:1", "parallel": {}}}},
     "the last of the job and nobody else's; they begin with 0, and roles.actor is on 1 to 1"),
    ({"rollout": {"async_steps": 1}, "roles": {"actor": {"ranks": "0:1"}, "critic": {"ranks": "1:2"}, "rollout": {
        "ranks": "1:2", "parallel": {}}}}, "they begin with 1, and roles.critic is on 1 to 1"),
    ({"run": {"objective": "grpo"}, "rollout": {"async_steps": 1}, "grpo": {"dynamic_sampling": 2}, "roles": {
        "actor": {"ranks": "0:1"}, "rollout": {"ranks": "1:2", "parallel": {}}}}, "set one of them to 0"),
    ({"parallel": {"data": 3}}, "roles.actor: batch.global.8. is not batch.micro.2. × data.3."),
])
def test_impossible_placements_are_refused(sections: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        rl_config(tmp_path, **sections)


@pytest.mark.parametrize(("sections", "message"), [
    ({"batch": {"global": 5}}, "leave batch.global out"), ({"ppo": {"minibatch": 5}}, "does not divide the 16 texts"),
    ({"rollout": {"max_new_tokens": 8}}, "leaves no room for a prompt"), ({"roles": {"reward": []}}, "needs something"),
    ({"roles": {"reward": {"weight": 1}}}, "names either a reward model"), ({"roles": {"actor": {"ranks": "4:2"}}},
                                                                             "a range such as"),
    ({"roles": {"critic": {"optim": {"rate": 1}}}}, "no key optim.rate"), ({"grpo": {"group": 1}}, "it takes two"),
    ({"rollout": {"correction": {"low": 3}}}, "is not below high"),
    ({"reliability": {"inject": [{"kind": "kill"}]}}, "ppo has no phase forward_backward, and the kill would never"),
    ({"reliability": {"inject": [{"kind": "nan", "phase": "gen"}]}}, "nan is taken back as gradients are reduced"),
])
def test_what_contradicts_itself_is_refused(sections: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=message):
        rl_config(tmp_path, **sections)


def test_what_is_not_finite_leaves_the_denominator(tmp_path: Path) -> None:
    """A token whose old log-probability is no number is not learned, not counted in means, and counted by itself."""
    config = rl_config(tmp_path, **QUICK)
    prompts = tuple(Prompt(i, (1, 2), "", {}) for i in range(2))
    rollouts = Rollouts(1, prompts, 1, (Response((3, 4, END), True), Response((5, END), True)))
    old = {0: torch.tensor([-1.0, float("nan"), -1.0]), 1: torch.tensor([-2.0, -1.0])}
    zeros = {0: torch.zeros(3), 1: torch.zeros(2)}
    found = gather(rollouts, np.ones(2), {LOG_PROBS: old, REFERENCE: old, VALUES: zeros}, [0, 1], 0.1, config,
                   Job("cpu").world)
    assert found.counts == {0: 2.0, 1: 2.0} and found.sums["tokens_left_out"] == 1
    assert all(table[row].isfinite().all() for table in found.fields.values() for row in (0, 1))
