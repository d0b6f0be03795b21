"""Phases: what is going on now, who is told of it, and where the time went.  Hooks: what is due when."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import Config
from engine.config.phases import OF_CORPORA
from engine.distributed.mesh import single_mesh
from engine.metrics.phases import Moment, Phases
from engine.train.corpora import Corpora
from engine.train.hooks import Hook
from engine.train.loop import Trainer
from tests.kit.runs import run_config


class Clock:
    """A second passes whenever somebody looks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        self.seconds += 1
        return self.seconds


def trainer_of(config: Config) -> Trainer:
    return Trainer.start(config, single_mesh(), Corpora.open(config), lambda: False)


def test_now_names_the_phase_and_its_step() -> None:
    phases = Phases(torch.device("cpu"), Clock())
    assert phases.now == Moment("start", 0, 1)
    with phases.step(7):
        assert (phases.now.phase, phases.now.step) == ("between", 7)
        with phases("load"):
            assert (phases.now.phase, phases.now.step) == ("load", 7)
            assert phases.now.since == 4
    with phases("save"):
        assert (phases.now.phase, phases.now.step) == ("save", 7), "what follows a step belongs to it"
    assert (phases.now.phase, phases.now.step) == ("between", 7)


def test_a_phase_in_which_something_failed_stays() -> None:
    phases = Phases(torch.device("cpu"))
    with pytest.raises(KeyError), phases.step(3), phases("update"):
        raise KeyError
    assert (phases.now.phase, phases.now.step) == ("update", 3)


def test_time_is_split_over_phases_and_what_is_besides_a_step_is_not_in_it() -> None:
    """The clock is read once as a phase begins, and at either end of what is measured."""
    clock = Clock()
    phases = Phases(torch.device("cpu"), clock)
    for step in (1, 2):
        with phases.step(step):
            with phases("load"):
                clock.seconds += 10
            with phases("update"):
                clock.seconds += 100
        with phases("save"):
            clock.seconds += 1000
    taken = phases.taken()
    assert (taken.steps, taken.by_phase) == (2, {"load": 22.0, "update": 202.0, "save": 2002.0})
    assert taken.in_steps == pytest.approx(2 * 119)
    assert phases.taken().steps == 0 and not phases.taken().by_phase


def test_on_a_gpu_marks_are_events_and_nobody_waits_before_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for CUDA's stream of work: events get their times when the device gets there."""
    device, waited = Clock(), []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.milliseconds = 1000 * device()

        def synchronize(self) -> None:
            waited.append(self)

        def elapsed_time(self, end: Event) -> float:
            return end.milliseconds - self.milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    phases = Phases(torch.device("cuda"))
    for step in (1, 2):
        with phases.step(step), phases("update"):
            device.seconds += 5
        with phases("save"):
            device.seconds += 7
    assert not waited
    taken = phases.taken()
    assert (taken.by_phase, taken.in_steps) == ({"update": 12.0, "save": 16.0}, 16.0) and waited


def test_a_run_tells_its_phases_in_order(tmp_path: Path) -> None:
    """A listener hears every phase as it begins; it may end the run there, as a fault to inject does."""
    config = run_config(tmp_path, "run", steps=3, checkpoint={"every": 2}, eval={"every": 3, "batches": 1},
                        parallel={"check_replicas_every": 2})
    trainer, heard = trainer_of(config), []
    trainer.phases.listeners.append(lambda moment: heard.append((moment.step, moment.phase)))
    assert trainer.run()
    trainer.close()
    besides = {1: ["log", "save"], 2: ["check_replicas", "log", "save", "save"], 3: ["evaluate", "log", "save", "save"]}
    assert heard == [(step, phase) for step in (1, 2, 3) for phase in (*OF_CORPORA.in_step, *besides[step])]


def test_a_listener_can_stop_a_run_in_any_phase(tmp_path: Path) -> None:
    class Fault(Exception):
        pass

    def inject(moment: Moment) -> None:
        if (moment.step, moment.phase) == (2, "update"):
            raise Fault

    trainer = trainer_of(run_config(tmp_path, "run", steps=3))
    trainer.phases.listeners.append(inject)
    with pytest.raises(Fault):
        trainer.run()
    trainer.close()
    assert (trainer.state.step, trainer.phases.now.phase) == (1, "update")


@pytest.mark.parametrize(("hook", "due"), [
    (Hook("x", lambda: None), []),
    (Hook("x", lambda: None, every=1), [1, 2, 3, 4, 5, 6]),
    (Hook("x", lambda: None, every=3), [3, 6]),
    (Hook("x", lambda: None, every=4, when=lambda step: step in (1, 4, 6)), [1, 4, 6]),
])
def test_a_hook_is_due_every_so_many_steps_and_when_it_says_so(hook: Hook, due: list[int]) -> None:
    assert [step for step in range(1, 7) if hook.due(step)] == due


def test_speed_is_that_of_the_steps_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates take two seconds and saves ten: a save between two lines is neither the steps' time nor forgotten."""
    trainer = trainer_of(run_config(tmp_path, "run", steps=4, log={"every": 4}, checkpoint={"every": 2}))
    now, rows = [0.0], []
    trainer.phases = Phases(torch.device("cpu"), lambda: now[0])
    monkeypatch.setattr(trainer.journal, "log", rows.append)

    def slow(method: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def slower(*arguments: Any) -> Any:
            now[0] += seconds
            return method(*arguments)

        return slower

    monkeypatch.setattr(trainer.state.optimizer, "step", slow(trainer.state.optimizer.step, 2.0))
    monkeypatch.setattr(trainer.writer, "save", slow(trainer.writer.save, 10.0))
    trainer.run()
    trainer.close()
    last = rows[-1]
    assert last["step"] == 4 and last["step_seconds"] == last["timing_s/update"] == 2.0
    assert last["tokens_per_second"] == 64 / 2.0
    assert (last["timing_s/save"], last["timing_s/load"], last["timing_s/evaluate"]) == (10.0, 0.0, 0.0)
