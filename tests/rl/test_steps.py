"""What a step does not always do: stop early, leave the actor alone, put scores on a scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.checkpoint.metadata import SCALE
from engine.checkpoint.write import save
from engine.config import Config
from engine.config.placement import ACTOR, CRITIC
from engine.distributed.mesh import Job
from engine.optim.gradients import StepSums
from engine.rl.loop import KL_SUM, MOST_KL, Learner
from engine.rl.rollouts import Rollouts
from tests.kit.digits import learner_of, rl_config
from tests.kit.distributed import job, run_distributed
from tests.kit.layouts import tiny_config
from tests.rl.test_placements import scoring_state
from tests.rl.test_resume import rows

SETTINGS: dict[str, Any] = {"steps": 3, "batch": {"micro": 1}, "rollout": {"prompts": 4}, "optim": {"lr": 0.03},
                            "ppo": {"minibatch": 4, "epochs": 3}}


def divergences(config: Config) -> list[tuple[float, float]]:
    """Of every update whose gradients were computed: how far the policy was from the old one, on the tokens of this
    rank alone and on all."""
    learner, found = learner_of(config, job()), list[tuple[float, float]]()
    state = learner.cast[ACTOR].state
    totals = state.totals

    def noted(sums: Tensor | None, **options: Any) -> StepSums | None:
        result = totals(sums, **options)
        assert sums is not None and result is not None
        found.append((float(sums[:, KL_SUM].sum()), float(result.sums[KL_SUM])))
        return result

    state.totals = noted                                                            # type: ignore[method-assign]
    learner.run()
    learner.close()
    return found


def test_the_early_stop_is_decided_on_what_all_ranks_have_alike(tmp_path: Path) -> None:
    """By a bound between what two ranks would say by themselves, so that they would part if each decided alone."""
    free = rl_config(tmp_path / "free", **SETTINGS | {"steps": 1}, parallel={"data": 2})
    by_rank = run_distributed(divergences, 2, free)
    total = [both for _, both in by_rank[0]]
    assert total == [both for _, both in by_rank[1]] and len(total) == 6
    own = [[2 * mine for mine, _ in each] for each in by_rank]           # a rank has half of the tokens
    split = next(number for number, (a, b) in enumerate(zip(*own, strict=True))
                 if abs(a - b) > 1e-3 and total[number] > 0 and max(total[:number], default=0.0) < total[number])
    bound = (max(total[:split], default=0.0) + total[split]) / 2 if split else total[split] / 2
    one, other = (next(number for number, value in enumerate(each) if value > bound) for each in own)
    assert one != other or one != split, "alone, a rank would have stopped elsewhere"
    tokens = rows(free)[1]["response_length/mean"] * 4                   # of a minibatch, on average
    made = set()
    for parallel in ({"data": 2}, {"data": 1}):
        config = rl_config(tmp_path / str(parallel), **SETTINGS | {
            "steps": 1, "ppo": SETTINGS["ppo"] | {"target_kl": bound / MOST_KL / tokens}}, parallel=parallel)
        found = run_distributed(divergences, parallel["data"], config)
        assert rows(config)[1]["actor/updates"] == len(found[0]) - 1 < 6
        made |= {len(each) for each in found}
    assert len(made) == 1


def weights(learner: Learner, name: str) -> list[Tensor]:
    return [piece.tensor.clone() for piece in learner.cast[name].state.masters()]


def test_the_critic_warms_up_alone(tmp_path: Path) -> None:
    config = rl_config(tmp_path, **SETTINGS | {"ppo": SETTINGS["ppo"] | {"critic_warmup_steps": 2}})
    seen: dict[int, dict[str, list[Tensor]]] = {}

    def told(rollouts: Rollouts) -> None:
        seen[rollouts.step] = {name: weights(learner, name) for name in (ACTOR, CRITIC)}

    learner = learner_of(config, Job("cpu"), told=told)
    seen[0] = {name: weights(learner, name) for name in (ACTOR, CRITIC)}
    learner.run()
    learner.close()

    def same(name: str, a: int, b: int) -> bool:
        return all(torch.equal(x, y) for x, y in zip(seen[a][name], seen[b][name], strict=True))

    assert same(ACTOR, 0, 1) and same(ACTOR, 1, 2) and not same(ACTOR, 2, 3)
    assert not any(same(CRITIC, step, step + 1) for step in range(3))
    assert [row["actor/updates"] for row in rows(config).values()] == [0, 0, 6]
    assert [row["skipped"] for row in rows(config).values()] == [0, 0, 0], "a step of the critic's is no skipped one"
    assert learner.state.num_updates == 6


def reward_model(folder: Path, config: Config, scale: dict[str, float] | None) -> str:
    """A reward model that has learned nothing, and what its run said of scores on samples held back."""
    state = scoring_state(config.model)
    state.roles[0].initialise(11)
    state.step, state.updates = 1, 0
    own = tiny_config(model=config.model.model_dump() | {"head": "score"})
    metadata = state.metadata(own, {}) | ({} if scale is None else {SCALE: scale})
    return str(save(folder, 1, state.pieces(), metadata, group=None, keep=None))


def scores_of(folder: Path, reward: str) -> dict[str, np.ndarray]:
    """What was said of a step's texts, by the model and in all."""
    found: list[Rollouts] = []
    config = rl_config(folder, **SETTINGS | {"steps": 1}, roles={"reward": [{"load": reward, "weight": 2.0}]})
    learner = learner_of(config, Job("cpu"), told=found.append)
    learner.texts._scorers = []
    learner.run()
    learner.close()
    return {"reward": found[0].parts["reward"], "all": found[0].scores}


def test_a_reward_model_speaks_in_standard_deviations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of its scores on samples held back: were those this step's, they would have a mean of 0 and a deviation of 1."""
    config = rl_config(tmp_path / "config", **SETTINGS)
    plain = scores_of(tmp_path / "plain", reward_model(tmp_path / "a", config, None))["reward"]
    assert np.ptp(plain) > 0 and "warning: reward: " in (said := capsys.readouterr().out) and "count raw" in said
    scale = {"mean": float(plain.mean()), "std": float(plain.std())}
    found = scores_of(tmp_path / "scaled", reward_model(tmp_path / "b", config, scale))
    assert "count raw" not in capsys.readouterr().out
    assert found["reward"].mean() == pytest.approx(0, abs=1e-6) and found["reward"].std() == pytest.approx(1, rel=1e-6)
    assert found["reward"] == pytest.approx((plain - scale["mean"]) / scale["std"], rel=1e-6)
    assert found["all"] == pytest.approx(2 * found["reward"]), "the weight is of standard deviations"
