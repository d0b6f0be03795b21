"""Texts that are made a step ahead: beside one process that makes them itself with weights that are a step old."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.resume import open_checkpoint
from engine.config import Config
from engine.config.placement import ACTOR, ROLLOUT
from engine.distributed.mesh import Job
from engine.distributed.pieces import Piece
from engine.errors import CheckpointError
from engine.metrics.phases import Moment
from engine.rl import ahead
from engine.rl.experience import SUMS, Experience
from engine.rl.loop import Learner
from engine.rl.rollouts import Prompt, Response
from tests.kit.compare import relative_error
from tests.kit.digits import learner_of, rl_config
from tests.kit.distributed import job, run_distributed
from tests.kit.layouts import TOLERANCE, assemble
from tests.rl.test_placements import EQUAL, Seen
from tests.rl.test_resume import rows

STEPS, PATIENCE_SECONDS = 4, 100
SETTINGS: dict[str, Any] = {
    "steps": STEPS, "batch": {"micro": 1}, "checkpoint": {"every": 1, "keep": 0},
    "ppo": {"minibatch": 4, "kl_target": 1.0, "kl_horizon": 50, "reward_norm": True}}
ROLLOUTS = {"prompts": 4, "correction": {"kind": "tis", "high": 1.2}}
TWO = {"actor": {"ranks": "0:1"}, "rollout": {"ranks": "1:2", "parallel": {}}}
FIVE = {"actor": {"ranks": "0:2", "parallel": {"tensor": 2}},
        "critic": {"ranks": "1:3", "parallel": {"data": 2}, "offload": True},
        "reference": {"ranks": "2:3", "parallel": {}}, "rollout": {"ranks": "3:5", "parallel": {"data": 2}}}


def configured(folder: Path, roles: dict[str, Any], **sections: Any) -> Config:
    asynchronous = {"rollout": ROLLOUTS | {"async_steps": 1}, "roles": roles | {"reward": {"function": "places"}}}
    return rl_config(folder, **SETTINGS | (asynchronous if roles else {"rollout": ROLLOUTS}) | sections)


class Late:
    """Makes texts as another does, with the weights that the actor had a step before it was asked to take over."""

    def __init__(self, learner: Learner) -> None:
        self._maker, self._cast = learner.maker, learner.cast
        self._before: list[torch.Tensor] | None = None
        self.steps: list[int] = []

    def take_over(self) -> int:
        received = self._maker.take_over()
        rollout = self._cast[ROLLOUT].state.weights()
        now = {piece.key: piece.tensor.clone() for piece in self._cast[ACTOR].state.weights()}
        current = [now[piece.key] for piece in rollout]
        for piece, old in zip(rollout, self._before or current, strict=True):
            piece.tensor.copy_(old)
        self._before = current
        return received

    def make(self, step: int, prompts: Sequence[Prompt], samples: int) -> Mapping[int, Response]:
        return self._maker.make(step, prompts, samples)


def run(config: Config, where: Job, late: bool = False, stops_after: int = 0) -> Seen:
    """A run; or up to a step in which it is asked to stop."""
    seen = Seen()
    learner: Learner = learner_of(config, where, lambda: 0 < stops_after <= learner.state.step + 1,
                                  told=lambda rollouts: seen.texts.append([each.tokens for each in rollouts.responses]))
    if late:
        learner.maker = learner.texts._maker = Late(learner)
    try:
        learner.run()
    finally:
        learner.close()
    seen.weights = [(piece.key, piece.global_shape, box, values.clone()) for piece in learner.state.pieces()
                    for box, values in piece.parts()]
    return seen


def run_here(config: Config, stops_after: int = 0) -> Seen:
    return run(config, job(), stops_after=stops_after)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Seen, dict[int, dict[str, Any]]]:
    """One process, with weights that are a step old."""
    config = configured(tmp_path_factory.mktemp("reference"), {})
    return run(config, Job("cpu"), late=True), rows(config)


def require_same(seen: list[Seen], config: Config, reference: tuple[Seen, dict[int, dict[str, Any]]],
                 texts: slice = slice(None), tolerance: float = TOLERANCE) -> None:
    one, want = reference
    assert seen[0].texts == one.texts[texts]
    for step, got in rows(config).items():
        keys = [key for key in (*EQUAL, "rollout_probs_diff_max", "rollout_probs_diff_mean") if key in want[step]]
        assert [got[key] for key in keys] == pytest.approx([want[step][key] for key in keys], rel=tolerance, abs=1e-6)
        assert got["actor/first_ratio_diff"] == 0.0
    weights, wanted = assemble(each.weights for each in seen), assemble([one.weights])
    assert weights.keys() == wanted.keys()
    assert not [key for key, value in wanted.items() if relative_error(weights[key], value) > tolerance]


@pytest.mark.parametrize(("roles", "size"), [(TWO, 2), (FIVE, 5)])
def test_it_is_learning_from_texts_of_weights_a_step_old(
        roles: dict[str, Any], size: int, tmp_path: Path, reference: tuple[Seen, dict[int, dict[str, Any]]]) -> None:
    config = configured(tmp_path, roles)
    require_same(run_distributed(run_here, size, config), config, reference, tolerance=0.0 if size == 2 else TOLERANCE)


def test_a_step_makes_a_difference(tmp_path: Path, reference: tuple[Seen, dict[int, dict[str, Any]]]) -> None:
    """The reference is not what a run does that waits for new weights, and its importance weights are none of 1."""
    config = configured(tmp_path, {})
    fresh, (one, records) = run(config, Job("cpu")), reference
    assert fresh.texts[:1] == one.texts[:1] and fresh.texts[1:] != one.texts[1:]
    found = rows(config)
    assert max(row["rollout_probs_diff_max"] for row in found.values()) < TOLERANCE
    assert records[1]["rollout_probs_diff_max"] < TOLERANCE
    assert all(records[step]["rollout_probs_diff_max"] > 0.01 for step in range(2, STEPS + 1))


@pytest.mark.parametrize("roles", [TWO, FIVE])
def test_it_goes_on_where_it_stopped(roles: dict[str, Any], tmp_path: Path,
                                     reference: tuple[Seen, dict[int, dict[str, Any]]]) -> None:
    """From the texts that were made and not learned from yet; in the same placement, and in another."""
    first = configured(tmp_path, TWO)
    run_distributed(run_here, 2, first, 2)
    saved = open_checkpoint(tmp_path / "checkpoints" / "step-00000002")
    held, _ = ahead.responses_in(saved, first)
    assert [each.tokens for each in held] == reference[0].texts[2]
    config = configured(tmp_path, roles)
    seen = run_distributed(run_here, 2 if roles is TWO else 5, config)
    require_same(seen, config, reference, slice(2, None), 0.0 if roles is TWO else TOLERANCE)


def test_a_kill_of_who_makes_texts_costs_the_step(tmp_path: Path,
                                                  reference: tuple[Seen, dict[int, dict[str, Any]]]) -> None:
    fault = {"kind": "kill", "rank": 1, "step": 3, "phase": "gen"}
    broken = configured(tmp_path, TWO, reliability={"watchdog": None, "inject": [fault]})
    with pytest.raises(AssertionError, match=r"the process ended|Connection closed by peer"):
        run_distributed(run_here, 2, broken)
    config = configured(tmp_path, TWO)
    require_same(run_distributed(run_here, 2, config), config, reference, slice(2, None), 0.0)


def test_texts_that_no_longer_fit_are_made_anew(tmp_path: Path) -> None:
    first = configured(tmp_path, TWO, steps=2)
    run_distributed(run_here, 2, first, 1)
    reader = open_checkpoint(tmp_path / "checkpoints" / "step-00000001")
    other = configured(tmp_path, TWO, rollout=ROLLOUTS | {"async_steps": 1, "temperature": 0.5})
    assert ahead.responses_in(reader, other) == (
        (), "texts that were made a step ahead are made anew, as rollout.temperature changed")
    assert ahead.responses_in(reader, configured(tmp_path, {})) == ((), "")
    with pytest.raises(CheckpointError, match="contradict each other"):
        ahead.responses_in(reader, first.model_copy(update={"model": first.model.model_copy(
            update={"vocab_size": 2})}))


def test_the_last_step_makes_no_texts_for_another(tmp_path: Path) -> None:
    config = configured(tmp_path, TWO, steps=3)
    made = run_distributed(steps_made, 2, config)
    assert made == [[], [1, 2, 3]]
    assert ahead.TOKENS not in open_checkpoint(tmp_path / "checkpoints" / "step-00000003")


def steps_made(config: Config) -> list[int]:
    """For which steps this rank was asked for texts, and had some to make."""
    learner, made = learner_of(config, job()), []
    make = learner.maker.make

    def noted(step: int, prompts: Sequence[Prompt], samples: int) -> Mapping[int, Response]:
        found = make(step, prompts, samples)
        made.extend([step] if found else [])
        return found

    learner.maker.make = noted                                                      # type: ignore[method-assign]
    learner.run()
    learner.close()
    return made


def test_nobody_waits_for_the_other_within_a_step(tmp_path: Path) -> None:
    """By the order of events: in step 2 the learner goes on in the midst of its updates only once texts of step 3 are
    complete, and in step 3 texts of step 4 are complete only once the learner has made all updates of step 3."""
    config = configured(tmp_path, TWO)
    assert run_distributed(wait_for_the_other, 2, config) == [True, True]


def wait_for_the_other(config: Config) -> bool:
    learner = learner_of(config, job())
    folder, make = Path(config.run.dir), learner.maker.make

    def awaited(name: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (folder / name).exists():
            assert time.monotonic() < deadline, f"waited for {name}: the two take turns"
            time.sleep(0.01)

    def noted(step: int, prompts: Sequence[Prompt], samples: int) -> Mapping[int, Response]:
        found = make(step, prompts, samples)
        if found and step == 4:
            awaited("updated-3")
        (folder / f"made-{step}").touch() if found else None
        return found

    def listen(moment: Moment) -> None:
        if job().rank == 0 and moment.phase == "update_actor" and moment.step == 2:
            awaited("made-3")
        if job().rank == 0 and moment.phase == "gen" and learner.phases.now.step == 3 and learned:
            (folder / "updated-3").touch()
        if moment.phase == "update_actor" and moment.step == 3:
            learned.append(True)

    learned: list[bool] = []
    learner.maker.make = noted                                                      # type: ignore[method-assign]
    learner.phases.listeners.append(listen)
    learner.run()
    learner.close()
    return True


def test_who_does_not_learn_has_the_same_sums(tmp_path: Path) -> None:
    found: list[set[str]] = []
    learner = learner_of(rl_config(tmp_path, steps=1), Job("cpu"))
    learn = learner._learn

    def noted(step: int, rollouts: Any, experience: Experience) -> Any:
        found.append(set(experience.sums) - {"probs_diff"})
        return learn(step, rollouts, experience)

    learner._learn = noted                                                          # type: ignore[method-assign]
    learner.run()
    learner.close()
    assert found == [set(SUMS)] == [set(Experience.nothing().sums)]


def test_texts_come_back_as_they_were() -> None:
    made = (Response((1, 2, 3), True, (-0.1, -1 / 3, -2e-7)), Response((4,), False, (-1e-30,)))
    pieces: dict[str, Piece] = {piece.key: piece for piece in ahead.pieces_of(made)}
    assert pieces[ahead.LENGTHS].tensor.tolist() == [3, 1] and pieces[ahead.TOKENS].tensor.tolist() == [1, 2, 3, 4]
    assert pieces[ahead.LOG_PROBS].tensor.tolist() == [-0.1, -1 / 3, -2e-7, -1e-30]
    assert json.dumps([*pieces]) and ahead.pieces_of(()) == []
