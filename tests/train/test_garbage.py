"""Collecting on schedule, and what makes it safe: steps leave no cycles that hold tensors."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.train import garbage
from engine.train.garbage import collected_on_schedule
from tests.kit.digits import learner_of, rl_config
from tests.kit.distributed import job
from tests.kit.runs import run_config, train_here

TRAINING = {"plain": {}, "recomputed in bf16": {"parallel": {"recompute": "full"}, "precision": {"compute": "bf16"}},
            "a save and an evaluation in every step": {"checkpoint": {"every": 1}, "eval": {"every": 1, "batches": 1}}}


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Tensors in cycles after every step but the first, which calls things for the first time."""
    found: list[Tensor] = []
    collect, calls = gc.collect, [0]

    def collected() -> int:
        gc.set_debug(gc.DEBUG_SAVEALL)
        number = collect()
        gc.set_debug(0)
        calls[0] += 1
        if calls[0] > 2:
            found.extend(each for each in gc.garbage if isinstance(each, torch.Tensor))
        gc.garbage.clear()
        collect()                                            # what was found, or it would be found again
        return number

    monkeypatch.setattr(garbage, "EVERY_STEPS", 1)
    monkeypatch.setattr(garbage.gc, "collect", collected)
    yield found
    assert calls[0] > 3 and gc.isenabled()


@pytest.mark.parametrize("sections", TRAINING.values(), ids=TRAINING)
def test_steps_leave_no_cycle_that_holds_a_tensor(sections: dict[str, Any], tmp_path: Path, held: list[Tensor]) -> None:
    train_here(run_config(tmp_path, "run", steps=4, **sections))
    assert held == []


def test_nor_do_steps_that_learn_from_own_texts(tmp_path: Path, held: list[Tensor]) -> None:
    learner = learner_of(rl_config(tmp_path, steps=4), job())
    learner.run()
    learner.close()
    assert held == []


def test_the_comparison_notices_a_cycle(held: list[Tensor]) -> None:
    with collected_on_schedule() as collect:
        for step in range(1, 5):
            box: list[Any] = [torch.ones(3)]
            box.append(box)
            del box
            collect(step)
    assert held


def test_only_on_schedule_and_afterwards_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    with collected_on_schedule() as collect:
        assert not gc.isenabled() and gc.get_freeze_count()
        monkeypatch.setattr(garbage.gc, "collect", lambda: called.append(1) or 0)
        for step in range(1, 2 * garbage.EVERY_STEPS + 1):
            collect(step)
        monkeypatch.undo()
    assert called == [1, 1] and gc.isenabled() and gc.get_freeze_count() == 0
