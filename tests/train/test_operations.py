"""A run computes with what its configuration names, says so, and refuses what it cannot have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.config import Config
from engine.distributed.topology import Topology
from engine.errors import ConfigError
from engine.kernels.table import TABLE
from engine.parallel.parallelize import ParallelModel
from engine.train.rank import run_rank
from tests.kit.layouts import check, reference, run_layout, tiny_config
from tests.kit.runs import metrics, run_config

REFERENCES = {operation.name: operation.reference.name for operation in TABLE}


def run_here(config: Config) -> bool:
    return run_rank(config, Topology.of(config), None, "environment", lambda: False)


def test_the_run_says_what_it_computes_with(tmp_path: Path) -> None:
    config = run_config(tmp_path, "run", steps=1, kernels={"attention": "reference"})
    assert run_here(config)
    lines = (Path(config.run.dir) / "doctor.txt").read_text().splitlines()
    assert lines[:3] == ["environment", "", "Operations of this run"]
    chosen = dict(line.split(";")[0].split() for line in lines[3:])
    assert chosen.keys() == REFERENCES.keys()
    assert (chosen["attention"], chosen["rope"], chosen["adamw"]) == ("reference", "octant", "torch-fused")


@pytest.mark.parametrize(("kernels", "message"), [
    ({"attention": "fastest"}, "kernels.attention: there is no implementation 'fastest'; there are auto, varlen, sdpa"),
    ({"rms_norm": "torch-fused"}, r"kernels.rms_norm: torch-fused cannot be used on cpu in fp32 \(for cuda only\)"),
])
def test_what_cannot_be_had_is_refused(kernels: dict[str, str], message: str, tmp_path: Path) -> None:
    config = run_config(tmp_path, "run", kernels=kernels)
    with pytest.raises(ConfigError, match=message):
        run_here(config)


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}, {"context": 2}], ids=str)
def test_references_train_the_same_model(layout: dict[str, Any]) -> None:
    config = tiny_config(parallel=layout, kernels=REFERENCES)
    check(run_layout(config, 3), reference(config, 3))


def test_a_run_with_deterministic_algorithms_is_the_same_run_on_a_processor(tmp_path: Path) -> None:
    """Every operation of a step has a deterministic algorithm, and there they are the ordinary ones."""
    runs = [run_config(tmp_path, str(on), steps=3, parallel={"reproducible": on}, data={"document_mask": True})
            for on in (False, True)]
    assert all(run_here(config) for config in runs)
    plain, ordered = ([row["loss"] for row in metrics(config)] for config in runs)
    assert plain == pytest.approx(ordered, rel=1e-6)


def test_a_run_that_goes_on_draws_no_initial_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def counted(initialise: Callable[..., None]) -> Callable[..., None]:
        def counting(model: ParallelModel, seed: int, **keys: bool) -> None:
            drawn.append(seed)
            initialise(model, seed, **keys)
        return counting

    monkeypatch.setattr(ParallelModel, "initialise", counted(ParallelModel.initialise))
    for steps in (2, 4):
        assert run_here(run_config(tmp_path, "run", steps=steps))
    assert len(drawn) == 1
