"""Processes that are killed in the middle of a phase, with SIGKILL, and what a new one makes of what they left.

The middle is found by counting: a whole run says how many operations of torch a phase of a step takes, and the process
kills itself at half of them.  In a save it is a point of the file that is being written.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config import Config
from engine.config.phases import OF_OWN_TEXTS
from engine.distributed.mesh import Job
from engine.metrics.events import read_events
from engine.metrics.phases import BETWEEN, Moment
from engine.rl.loop import Learner
from tests.kit.digits import learner_of, rl_config
from tests.kit.distributed import CONTEXT, job, run_distributed
from tests.kit.layouts import Shards
from tests.rl import test_resume
from tests.rl.test_resume import assert_ends_as, rows

SETTINGS = test_resume.SETTINGS | {"steps": 3}
STEP = 2
COMPUTED = ("reshard", "gen", "values", "adv", "update_critic", "update_actor")


class Operations(TorchDispatchMode):
    """Counts the operations of every phase of `STEP`, and kills the process at one of them."""

    def __init__(self, learner: Learner, die_at: tuple[str, int] | None) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._phases, self._die_at = learner.phases, die_at

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        now = self._phases.now
        if now.step == STEP and now.phase != BETWEEN:
            self.counts[now.phase] += 1
            if (now.phase, self.counts[now.phase]) == self._die_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **(kwargs or {}))


def run(config: Config, where: Job, counted: bool = False, die_at: tuple[str, int] | None = None,
        die_in_save: str = "") -> tuple[Shards, Counter[str]]:
    learner = learner_of(config, where)
    if die_in_save:
        def on_point(name: str) -> None:
            if learner.phases.now.step == STEP and name == die_in_save:
                os.kill(os.getpid(), signal.SIGKILL)

        learner.writer._on_point = on_point
    operations = Operations(learner, die_at)
    try:
        with operations if counted else nullcontext():
            learner.run()
    finally:
        learner.close()
    return [(piece.key, piece.global_shape, box, values.clone()) for piece in learner.state.pieces()
            for box, values in piece.parts()], operations.counts


def run_here(config: Config) -> Shards:
    return run(config, job())[0]


def live(config: Config, die_at: tuple[str, int] | None, die_in_save: str) -> None:
    """A life, in a process of its own."""
    torch.set_num_threads(1)
    run(config, Job("cpu"), die_at is not None, die_at, die_in_save)


def killed(config: Config, die_at: tuple[str, int] | None = None, die_in_save: str = "") -> None:
    process = CONTEXT.Process(target=live, args=(config, die_at, die_in_save), daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    saved = sorted(path.name for path in (Path(config.run.dir) / "checkpoints").glob("step-????????"))
    assert saved[-1] == f"step-{STEP - 1:08d}", "it died before its step was saved"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shards, Counter[str], dict[int, dict[str, Any]]]:
    config = rl_config(tmp_path_factory.mktemp("whole"), **SETTINGS)
    return *run(config, Job("cpu"), counted=True), rows(config)


@pytest.mark.parametrize("phase", COMPUTED)
def test_a_kill_in_the_middle_of_a_phase_costs_the_step_and_nothing_else(
        phase: str, tmp_path: Path, whole: tuple[Shards, Counter[str], dict[int, dict[str, Any]]]) -> None:
    wanted, counts, records = whole
    config = rl_config(tmp_path, **SETTINGS)
    assert counts[phase] > 2
    killed(config, (phase, counts[phase] // 2))
    again, _ = run(config, Job("cpu"))
    assert all(torch.equal(got[-1], want[-1]) for got, want in zip(again, wanted, strict=True))
    assert rows(config) == records


@pytest.mark.parametrize("point", ["chunk written", "manifest written"])
def test_a_kill_in_a_save_costs_the_step_and_nothing_else(
        point: str, tmp_path: Path, whole: tuple[Shards, Counter[str], dict[int, dict[str, Any]]]) -> None:
    config = rl_config(tmp_path, **SETTINGS)
    killed(config, die_in_save=point)
    again, _ = run(config, Job("cpu"))
    assert all(torch.equal(got[-1], want[-1]) for got, want in zip(again, whole[0], strict=True))
    assert rows(config) == whole[2]


def test_one_of_two_ranks_is_killed_by_the_configuration_and_another_placement_goes_on(
        tmp_path: Path, whole: tuple[Shards, Counter[str], dict[int, dict[str, Any]]]) -> None:
    """As `reliability.inject` has it; the other rank hears of it from the connection."""
    fault = {"kind": "kill", "rank": 1, "step": STEP, "phase": "update_critic"}
    first = rl_config(tmp_path, **SETTINGS | {"parallel": {"data": 2}, "reliability": {
        "watchdog": None, "inject": [fault]}})
    with pytest.raises(AssertionError, match=r"rank 1 ---\nthe process ended|Connection closed by peer"):
        run_distributed(run_here, 2, first)
    assert [event.detail for event in read_events(tmp_path) if event.kind == "injected"] == [
        {"fault": "kill", "phase": "update_critic"}]
    other = rl_config(tmp_path, **SETTINGS, roles={
        "actor": {"ranks": "0:1"}, "critic": {"ranks": "0:2", "parallel": {"tensor": 2}}})
    assert_ends_as(other, run_distributed(run_here, 2, other), whole[0], whole[2])


def test_all_phases_are_listened_to(tmp_path: Path) -> None:
    """What a fault may name is what a step has, in its order."""
    heard: list[str] = []
    learner = learner_of(rl_config(tmp_path, **SETTINGS | {"steps": 1}), Job("cpu"))

    def listen(moment: Moment) -> None:
        if moment.phase in OF_OWN_TEXTS.in_step and moment.step == 1 and moment.phase not in heard:
            heard.append(moment.phase)

    learner.phases.listeners.append(listen)
    learner.run()
    learner.close()
    order = [name for name in OF_OWN_TEXTS.in_step if name != "reward"]          # told of in the midst of gen
    assert [name for name in heard if name != "reward"] == order and "reward" in heard
