"""Low-rank adapters: every layout trains them as one process does, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.errors import ConfigError
from engine.model.adapter import attach_adapters
from engine.model.flops import count_adapter
from engine.model.transformer import Transformer
from tests.kit.layouts import check, reference, run_layout, tiny_config

EVERYWHERE = {"rank": 3, "alpha": 5, "targets": ["all-linear", "lm_head"]}
LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {}, "tensor": {"tensor": 2}, "tensor 4": {"tensor": 4}, "tensor, whole sequences":
    {"tensor": 2, "sequence": False}, "context": {"context": 2},
    "context × tensor": {"context": 2, "tensor": 2, "recompute": "selective"},
    "1f1b": {"pipeline": 2}, "interleaved × tensor": {"pipeline": 2, "virtual_stages": 2, "schedule": "interleaved",
                                                      "tensor": 2},
    "zb-h1": {"pipeline": 2, "schedule": "zb-h1", "tensor": 2}, "zb-v": {"pipeline": 2, "schedule": "zb-v",
                                                                         "virtual_stages": 2},
    "zero 0": {"data": 2, "zero": 0}, "zero 1": {"data": 2, "zero": 1}, "zero 2": {"data": 2, "zero": 2},
    "zero 3": {"data": 2, "zero": 3}, "zero 3 × tensor": {"data": 2, "zero": 3, "tensor": 2, "recompute": "full"},
    "zero 2, reproducible": {"data": 2, "zero": 2, "reproducible": True},
    "hybrid": {"data": 4, "zero": 3, "zero_shard": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_one_process(layout: str) -> None:
    config = tiny_config(parallel=LAYOUTS[layout], adapter=EVERYWHERE, model={"num_kv_heads": 4, "num_heads": 8})
    check(run_layout(config, 3), reference(config, 3))


DROPPED = ["single", "tensor", "tensor, whole sequences", "context × tensor", "interleaved × tensor", "zb-h1",
           "zero 3 × tensor", "1f1b"]


@pytest.mark.parametrize("layout", DROPPED)
def test_every_layout_drops_the_same(layout: str) -> None:
    """Also where layers are recomputed, several microbatches being in flight."""
    parallel = LAYOUTS[layout] | ({"recompute": "full"} if layout == "1f1b" else {})
    config = tiny_config(parallel=parallel, adapter=EVERYWHERE | {"dropout": 0.3}, model={"num_heads": 8})
    want, without = reference(config, 3), reference(config.with_changes(adapter={"dropout": 0.0}), 3)
    assert want.losses != without.losses
    check(run_layout(config, 3), want)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj", "up_proj"], ["down_proj"], ["o_proj", "lm_head"]],
                         ids=",".join)
@pytest.mark.parametrize("parallel", [{"tensor": 4}, {"pipeline": 2, "recompute": "selective"}, {"data": 2, "zero": 3}],
                         ids=str)
def test_any_projections(targets: list[str], parallel: dict[str, Any]) -> None:
    config = tiny_config(parallel=parallel, adapter={"rank": 2, "targets": targets},
                         model={"num_kv_heads": 2, "num_heads": 8})
    check(run_layout(config, 2), reference(config, 2))


@pytest.mark.parametrize("mlp", ["gelu", "relu2"])
@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}, {"data": 2, "zero": 3}], ids=str)
def test_two_matrices_have_no_gate(mlp: str, parallel: dict[str, Any]) -> None:
    """And biases are left as they are."""
    config = tiny_config(parallel=parallel, adapter=EVERYWHERE, model={
        "num_kv_heads": 4, "num_heads": 8, "mlp": mlp, "qk_norm": True, "mlp_bias": True, "attention_bias": True})
    with torch.device("meta"):
        model = Transformer(config.model)
    assert config.adapter is not None
    attach_adapters(model, config.adapter)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == count_adapter(config.model, config.adapter)
    assert any(name.endswith("b_up_proj") for name in trained) and not any("gate_proj" in name for name in trained)
    check(run_layout(config, 2), reference(config, 2))


def test_a_gate_that_is_not_there_is_refused() -> None:
    config = tiny_config(adapter={"targets": ["q_proj", "gate_proj"]}, model={"mlp": "gelu"})
    assert config.adapter is not None
    message = "has gate_proj, which a model with model.mlp: gelu does not have; its layers have q_proj, k_proj"
    with pytest.raises(ConfigError, match=message):
        count_adapter(config.model, config.adapter)
    with pytest.raises(ConfigError, match=message):
        attach_adapters(Transformer(config.model), config.adapter)
