"""The picture's costs follow from the model, and its numbers from them."""

from __future__ import annotations

from typing import Any

import pytest

from engine.model.flops import count_parameters, flops_per_token
from engine.parallel.pipeline.timeline import timeline
from tests.kit.layouts import tiny_config


def test_one_stage_costs_what_the_formula_counts() -> None:
    """6·N + 6·L·h·s operations per token, forward and backward, are three forward passes and a little embedding."""
    config = tiny_config(data={"seq_len": 64})
    drawn = timeline(config)
    costs, model = drawn.costs, config.model
    forward = count_parameters(model).matmul + model.num_layers * model.hidden_size * 64 + model.hidden_size
    attention = model.num_layers * model.hidden_size * 64
    assert flops_per_token(model, 64) == 6 * (forward - model.hidden_size)
    assert (costs.forward, costs.communication) == (1, 0)
    assert costs.backward == pytest.approx(1 + attention / forward)
    assert costs.weight == pytest.approx(1 - attention / forward)
    assert drawn.makespan == pytest.approx(3 * config.num_microbatches)


@pytest.mark.parametrize(("parallel", "work"), [
    ({}, 3), ({"recompute": "selective"}, 3), ({"recompute": "full"}, 4), ({"recompute": "full",
                                                                           "recompute_layers": 99}, 4),
    ({"recompute": "full", "recompute_layers": 1}, 3.5), ({"recompute": "full", "recompute_layers": (0, 2)}, 3),
])
def test_recomputation_is_part_of_the_backward_pass(parallel: dict[str, Any], work: float) -> None:
    """Two stages of two layers; with hardly any vocabulary both cost the same, and the first counts."""
    config = tiny_config(parallel={"pipeline": 2} | parallel, model={"vocab_size": 1})
    drawn = timeline(config)
    assert drawn.costs.work == pytest.approx(work, rel=0.01)
    assert drawn.makespan == pytest.approx((config.num_microbatches + 1) * work, rel=0.01)


def test_the_slowest_stage_sets_the_pace() -> None:
    """A vocabulary that is worth several layers is left alone with one layer; attention's share there is small."""
    few, many = (timeline(tiny_config(parallel={"pipeline": 2}, model={"vocab_size": size})).costs.backward - 1
                 for size in (97, 100_000))
    assert 0 < many < few / 10
