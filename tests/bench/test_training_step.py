"""The benchmark of a training step runs: ours, transformers', and a layout in processes of its own."""

from __future__ import annotations

import pytest

from benchmarks.training_step import make_config, octant_step, running_layout, transformers_step
from engine.distributed.mesh import single_mesh


def test_steps_of_one_process_run() -> None:
    pytest.importorskip("transformers")
    octant_step(make_config(), single_mesh())()
    transformers_step(make_config())()


def test_a_layout_runs_and_reports_its_seconds() -> None:
    with running_layout({"tensor": 2}, threads=1) as step:
        assert 0 < step() < 100
