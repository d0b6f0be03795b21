"""The benchmark of a training step runs: ours, transformers', and a layout in processes of its own."""

from __future__ import annotations

import pytest

from benchmarks.training_step import SIZES, TORCH_PRODUCTS, octant_step, running_layout, transformers_step
from engine.distributed.mesh import single_mesh


def test_steps_of_one_process_run() -> None:
    pytest.importorskip("transformers")
    config = SIZES["tiny"].config()
    octant_step(config, single_mesh())()
    octant_step(config.with_changes(kernels=TORCH_PRODUCTS), single_mesh())()
    transformers_step(config)()
    transformers_step(config, fused=False)()


def test_a_layout_runs_and_reports_its_seconds() -> None:
    with running_layout(SIZES["tiny"].config(tensor=2), threads=1) as step:
        assert 0 < step() < 100
