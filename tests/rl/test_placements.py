"""The whole loop is the same mathematics wherever its roles live: five steps beside those of one process.

Texts are the same tokens; scores, divergence, losses and gradient norms within 1e-5.  The first ratio of every step is
1 to the last bit, because old log-probabilities come from the same kernels and the same microbatches.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.write import save
from engine.config import Config, ModelConfig, ParallelConfig
from engine.distributed.mesh import Job
from engine.rl.loop import Learner
from engine.train.role import Role, RoleState
from engine.train.state import TrainState
from tests.kit.compare import relative_error
from tests.kit.digits import learner_of, rl_config
from tests.kit.distributed import job, run_distributed
from tests.kit.layouts import TOLERANCE, Shards, assemble, tiny_config
from tests.kit.made import write_corpus

MODEL = {"num_layers": 4}
NUM_STEPS = 5
EQUAL = ("critic/score/mean", "critic/rewards/mean", "critic/returns/mean", "critic/values/mean", "critic/vf_loss",
         "critic/vf_explained_var", "critic/grad_norm", "actor/pg_loss", "actor/entropy", "actor/grad_norm",
         "actor/ppo_kl", "actor/pg_clipfrac", "actor/kl_coef", "objective/kl", "response_length/mean", "actor/updates",
         "critic/score/reward2", "actor/ptx_loss")

HALF = {"data": 2}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "tensor": {"parallel": {"tensor": 2, "data": 2}},
    "pipeline": {"parallel": {"tensor": 2, "pipeline": 2}},
    "zero 3": {"parallel": {"data": 4, "zero": 3}},
    "zero 2, texts made by one copy": {"parallel": {"data": 4, "zero": 2}, "roles": {"actor": {"generate": {
        "tensor": 4}}}},
    "context": {"parallel": {"context": 2, "tensor": 2}},
    "interleaved": {"parallel": {"pipeline": 2, "data": 2, "schedule": "interleaved", "virtual_stages": 2}},
    "v-shaped, texts made by four stages": {
        "parallel": {"pipeline": 2, "tensor": 2, "schedule": "zb-v", "virtual_stages": 2},
        "roles": {"actor": {"generate": {"pipeline": 4}}}},
    "actor and reference, critic and reward": {"roles": {
        "actor": {"ranks": "0:2", "parallel": {"tensor": 2}}, "critic": {"ranks": "2:4", "parallel": HALF},
        "reward": {"ranks": "2:4", "parallel": {"pipeline": 2}}}},
    "texts on ranks of their own": {"rollout": {"delta": True}, "roles": {      # of which changes alone are sent
        "actor": {"ranks": "2:4", "parallel": {"pipeline": 2}}, "rollout": {"ranks": "0:2", "parallel": HALF},
        "critic": {"ranks": "0:4", "parallel": {"tensor": 2, "data": 2}}}},
    "all disjoint": {"roles": {
        "actor": {"ranks": "0:4", "parallel": {"tensor": 2, "pipeline": 2}, "generate": {"tensor": 4}},
        "critic": {"ranks": "4:6", "parallel": HALF}, "reference": {"ranks": "6:7", "parallel": {}},
        "reward": {"ranks": "7:8", "parallel": {}}}},
    "overlapping": {"roles": {
        "actor": {"ranks": "1:5", "parallel": {"tensor": 2, "data": 2, "zero": 2}},
        "critic": {"ranks": "3:7", "parallel": {"pipeline": 2, "data": 2}},
        "reference": {"ranks": "0:2", "parallel": {"tensor": 2}}, "rollout": {"ranks": "6:8", "parallel": HALF},
        "reward": {"ranks": "all", "parallel": {"data": 4, "tensor": 2}}}},
    "three ways at once": {"parallel": {"tensor": 2, "pipeline": 2, "data": 2}, "roles": {"critic": {
        "ranks": "all", "parallel": {"data": 4, "context": 2, "zero": 3}}}},
}


def run_config(directory: Path, reward: Path, placement: dict[str, Any], **sections: Any) -> Config:
    """Eight texts a step; scored by a function and by a model."""
    roles = dict(placement.get("roles", {}))
    model = {"load": str(reward), "weight": 0.5} | roles.pop("reward", {})
    settings = {"model": MODEL, "steps": NUM_STEPS, "batch": {"micro": 1},
                "rollout": {"prompts": 4, "temperature": 0.8} | placement.get("rollout", {}),
                "ppo": {"minibatch": 4, "kl_target": 1.0, "kl_horizon": 50, "reward_norm": True,
                        "ptx_coef": 0.5},
                "data": {"seq_len": 8, "pad_to_multiple": 1,
                         "train": [{"path": str(reward.parents[1] / "text"), "kind": "pretrain"}]},
                "parallel": placement.get("parallel", {}),
                "roles": roles | {"reward": [{"function": "places"}, model]}}
    return rl_config(directory, **settings | sections)


@cache
def reward_model(directory: Path) -> Path:
    """A checkpoint of one that has learned nothing; by one process."""
    model = rl_config(directory, model=MODEL | {"head": "language_model"}).model
    state = scoring_state(model)
    state.roles[0].initialise(11)
    state.step, state.updates = 1, 0
    config = tiny_config(model=model.model_dump() | {"head": "score"})
    return save(directory / "reward", 1, state.pieces(), state.metadata(config, {}), group=None, keep=None)


def scoring_state(model: ModelConfig) -> TrainState:
    scoring = model.model_copy(update={"head": "score"})
    config = tiny_config(model=scoring.model_dump())
    return TrainState((RoleState.build(Role("reward", scoring, ParallelConfig(data=1), range(1)), config, Job("cpu")),))


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    write_corpus(folder / "text", [[*range(10)] * 30])
    return reward_model(folder)


class Seen:
    """What a rank saw of a run: its texts, and the weights in the end."""

    def __init__(self) -> None:
        self.texts: list[list[tuple[int, ...]]] = []
        self.scores: list[list[float]] = []
        self.weights: Shards = []


def run(config: Config, where: Job) -> Seen:
    seen = Seen()
    learner: Learner = learner_of(config, where, told=lambda rollouts: (
        seen.texts.append([each.tokens for each in rollouts.responses]),
        seen.scores.append(rollouts.scores.tolist())) and None)
    try:
        assert learner.run()
    finally:
        learner.close()
    seen.weights = [(piece.key, piece.global_shape, box, values.clone()) for piece in learner.state.pieces()
                    for box, values in piece.parts()]
    return seen


def run_here(config: Config) -> Seen:
    return run(config, job())


def rows(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(reward: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Seen, list[dict[str, Any]]]:
    """The same in one process, which never heard of others."""
    config = run_config(tmp_path_factory.mktemp("alone"), reward, {})
    return run(config, Job("cpu")), rows(config)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_every_placement_is_the_same_mathematics(name: str, reward: Path, tmp_path: Path,
                                                 alone: tuple[Seen, list[dict[str, Any]]]) -> None:
    config = run_config(tmp_path, reward, PLACEMENTS[name])
    size = max(int(part.ranks.split(":")[1]) for part in (config.roles.actor, config.roles.critic,
                                                          *config.roles.reward[1:]) if part.ranks is not None)
    size = max(size, int(((config.roles.rollout and config.roles.rollout.ranks) or "0:0").split(":")[1]))
    seen = run_distributed(run_here, size, config)
    one, want = alone
    assert seen[0].texts == one.texts and seen[0].scores == [pytest.approx(each, rel=TOLERANCE) for each in one.scores]
    for got, wanted in zip(rows(config), want, strict=True):
        assert [got[key] for key in EQUAL] == pytest.approx([wanted[key] for key in EQUAL], rel=TOLERANCE, abs=1e-6)
        assert got["actor/first_ratio_diff"] == 0.0
        assert got["rollout_probs_diff_max"] < TOLERANCE
    weights, one_s = assemble(each.weights for each in seen), assemble([one.weights])
    assert weights.keys() == one_s.keys()
    assert not [key for key, value in one_s.items() if relative_error(weights[key], value) > TOLERANCE]


def test_the_numbers_move(alone: tuple[Seen, list[dict[str, Any]]]) -> None:
    """What the others are compared with is no standstill."""
    seen, found = alone
    assert len({json.dumps(each) for each in seen.texts}) == NUM_STEPS
    assert found[-1]["objective/kl"] > 0.05 and found[-1]["actor/kl_coef"] != found[0]["actor/kl_coef"]
    assert all(row["actor/pg_clipfrac"] > 0 for row in found[:2])
    assert torch.tensor([row["critic/vf_loss"] for row in found]).std() > 0
