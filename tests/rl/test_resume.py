"""A run that is broken off in any phase of a step goes on as if nothing had been: bit for bit in the same placement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import Config
from engine.distributed.mesh import Job
from engine.errors import CheckpointError
from engine.metrics.phases import Moment
from tests.kit.compare import relative_error
from tests.kit.digits import learner_of, rl_config
from tests.kit.distributed import job, run_distributed
from tests.kit.layouts import TOLERANCE, Shards, assemble

SETTINGS: dict[str, Any] = {
    "steps": 4, "batch": {"micro": 1}, "checkpoint": {"every": 1}, "rollout": {"prompts": 4},
    "ppo": {"minibatch": 4, "kl_target": 1.0, "kl_horizon": 50, "reward_norm": True}}
OF_TIME = ("time", "timing", "memory", "step_", "tokens_per", "goodput", "own_", "slowest_", "waiting_")
PHASES = ("gen", "reward", "adv", "update_critic", "update_actor", "save")


class Broken(Exception):
    """The process is gone."""


def run(config: Config, where: Job, breaks_in: str = "", at_step: int = 3) -> Shards:
    """State at the end; or broken off as a phase of a step begins."""
    learner = learner_of(config, where)

    def listen(moment: Moment) -> None:
        if moment.phase == breaks_in and moment.step == at_step:
            raise Broken

    learner.phases.listeners.append(listen)
    try:
        learner.run()
    except Broken:
        learner.writer.wait()
    finally:
        learner.close()
    return [(piece.key, piece.global_shape, box, values.clone()) for piece in learner.state.pieces()
            for box, values in piece.parts()]


def run_here(config: Config, breaks_in: str = "") -> Shards:
    return run(config, job(), breaks_in)


def rows(config: Config) -> dict[int, dict[str, Any]]:
    """The last record of every step."""
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: {key: value for key, value in row.items() if not key.startswith(OF_TIME)}
            for row in map(json.loads, lines)}


def assert_ends_as(config: Config, ranks: list[Shards], wanted: Shards, records: dict[int, dict[str, Any]]) -> None:
    """A run that went on in another placement ends with this state and these records, up to the rounding of fp32."""
    got, want = assemble(ranks), assemble([wanted])
    assert got.keys() == want.keys()
    assert not [key for key in want if relative_error(got[key], want[key]) > TOLERANCE]
    for key in ("critic/score/mean", "critic/vf_loss", "actor/pg_loss", "actor/kl_coef", "objective/kl"):
        assert rows(config)[config.steps][key] == pytest.approx(records[config.steps][key], rel=TOLERANCE, abs=1e-6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shards, dict[int, dict[str, Any]]]:
    config = rl_config(tmp_path_factory.mktemp("whole"), **SETTINGS)
    return run(config, Job("cpu")), rows(config)


@pytest.mark.parametrize("phase", PHASES)
def test_a_step_that_was_broken_off_is_done_again(phase: str, tmp_path: Path,
                                                  whole: tuple[Shards, dict[int, dict[str, Any]]]) -> None:
    config = rl_config(tmp_path, **SETTINGS)
    run(config, Job("cpu"), phase)
    again, (wanted, records) = run(config, Job("cpu")), whole
    assert all(torch.equal(got[-1], want[-1]) for got, want in zip(again, wanted, strict=True))
    assert rows(config) == records


def test_it_goes_on_in_another_placement(tmp_path: Path, whole: tuple[Shards, dict[int, dict[str, Any]]]) -> None:
    run(rl_config(tmp_path, **SETTINGS), Job("cpu"), "update_actor")
    other = rl_config(tmp_path, **SETTINGS, roles={
        "actor": {"ranks": "0:2", "parallel": {"tensor": 2}}, "critic": {"ranks": "2:4", "parallel": {"pipeline": 2}}})
    assert_ends_as(other, run_distributed(run_here, 4, other), *whole)


def test_what_a_checkpoint_holds(tmp_path: Path) -> None:
    config = rl_config(tmp_path, **SETTINGS)
    run(config, Job("cpu"), "gen")
    about = json.loads((tmp_path / "checkpoints" / "step-00000002" / "manifest.json").read_bytes())["metadata"]
    assert about["rl"]["next_prompt"] == about["state"]["consumed_samples"] == 8
    assert about["state"]["optimizer_step"] == 2 * 2 * 2                       # steps × epochs × minibatches
    assert about["rl"]["scores"][0] == 16 and about["rl"]["kl_coef"] != 0.1


def test_a_run_of_something_else_is_not_gone_on_from(tmp_path: Path) -> None:
    first = rl_config(tmp_path, **SETTINGS | {"steps": 1})
    run(first, Job("cpu"))
    path = str(next((tmp_path / "checkpoints").glob("step-*")))
    other = rl_config(tmp_path / "other", **SETTINGS | {"model": {"hidden_size": 24}}, roles={"actor": {"load": path}})
    with pytest.raises(CheckpointError, match=r"roles.actor: .* is of another model"):
        learner_of(other, Job("cpu"))
