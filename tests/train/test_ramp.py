"""A run whose batch grows: two runs of even batches one after the other, in every layout and through a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config import Config
from tests.kit.compare import relative_error
from tests.kit.layouts import assemble
from tests.kit.runs import LAYOUTS, metrics, run_config, train, trained

SIZES = [2, 2, 2, 8, 8]                                    # from 16 tokens × 5 samples on: the first 6 are passed then
CONSTANT = {"decay": "constant", "warmup_steps": 0}


def ramped(folder: Path, name: str, **sections: Any) -> Config:
    return run_config(folder, name, batch={"global": 8, "ramp": [[0, 2], [16 * 5, 8]]}, **sections)


def test_it_is_small_batches_and_then_large_ones(tmp_path: Path) -> None:
    """The oracle: a run of batches of 2 that goes on with batches of 8."""
    config = ramped(tmp_path, "ramped", optim=CONSTANT)
    got = assemble(train(config))
    assert [row["consumed_samples"] for row in metrics(config)] == [sum(SIZES[:step]) for step in range(1, 6)]
    small = run_config(tmp_path, "even", steps=3, batch={"global": 2}, optim=CONSTANT)
    train(small)
    large = run_config(tmp_path, "even", steps=5, batch={"global": 8}, optim=CONSTANT)
    want = assemble(train(large))
    assert got.keys() == want.keys()
    assert all(bool((got[key] == want[key]).all()) for key in want)
    assert [row["loss"] for row in metrics(config)] == [row["loss"] for row in metrics(large)]


def test_evaluations_do_not_grow(tmp_path: Path) -> None:
    """They see all of their samples, in batches of the final size, also while the run's are small."""
    same = {"steps": 1, "eval": {"every": 1, "batches": 2}, "optim": {**CONSTANT, "lr": 1e-9}}
    losses = []
    for batch in ({"global": 8, "ramp": [[0, 2], [16 * 5, 8]]}, {"global": 8}):
        config = run_config(tmp_path, f"run{len(batch)}", batch=batch, **same)
        train(config)
        losses.append(metrics(config)[-1]["valid_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("layout", ["zero 1", "zero 3", "interleaved", "tensor × pipeline", "zb-v × zero 2", "context"])
def test_every_layout(tmp_path: Path, layout: str) -> None:
    single, cut = ramped(tmp_path, "single"), ramped(tmp_path, "cut", parallel=LAYOUTS[layout])
    want, got = assemble(train(single)), assemble(train(cut))
    assert got.keys() == want.keys()
    assert max(relative_error(got[key], want[key]) for key in want if key.startswith("model.")) < 1e-5
    assert [row["consumed_samples"] for row in metrics(cut)] == [row["consumed_samples"] for row in metrics(single)]
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in metrics(cut)] == pytest.approx([row[key] for row in metrics(single)], rel=1e-5)
    assert [row["lr"] for row in metrics(cut)] == [row["lr"] for row in metrics(single)]


@pytest.mark.parametrize("layout", ["zero 1", "interleaved"])
def test_a_resume_within_the_ramp(tmp_path: Path, layout: str) -> None:
    """Gone after step 3, the last one of the small size, and stopped in step 4, the first of the large one."""
    whole = ramped(tmp_path, "whole", parallel=LAYOUTS[layout])
    train(whole)
    broken = ramped(tmp_path, "broken", parallel=LAYOUTS[layout])
    train(broken, crash_after=3)
    train(broken, stop_at=4)
    train(broken)
    assert trained(broken) == trained(whole)
