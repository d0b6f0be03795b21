"""A kind of half is a class and a row: all who must know it then do.  The class is that of docs/extending.md."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from engine.config import Config, ModelConfig
from engine.config.kinds import MLPS
from engine.model.activations import layer_bytes_per_token
from engine.model.flops import count_parameters, flops_per_token
from tests.kit.distributed import run_distributed
from tests.kit.layouts import Result, check, tiny_config, train_layout
from tests.kit.page import importable
from tests.kit.reference import train_reference
from tests.model.test_activations import LENGTH, kept_bytes
from tests.model.test_inventory import check_inventory

MODEL = {"num_layers": 4, "hidden_size": 32, "num_heads": 4, "ffn_hidden_size": 64, "vocab_size": 97,
         "mlp": "scaled-gelu"}
LAYOUTS: list[dict[str, Any]] = [
    {}, {"tensor": 2, "recompute": "selective"}, {"tensor": 2, "sequence": False, "data": 2, "zero": 3},
    {"pipeline": 2, "schedule": "zb-v", "virtual_stages": 2, "recompute": "full"}]


def add(patch: pytest.MonkeyPatch) -> None:
    importable(patch, "class Scaled(", "added_kind")
    importable(patch, "class ScaledGELU", "engine.model.scaled")
    patch.setitem(MLPS, "scaled-gelu", "added_kind:SCALED")


def train_with_it(values: dict[str, Any], num_steps: int) -> Result:
    """`train_layout` in a process of the pool, which does not know the kind."""
    with pytest.MonkeyPatch.context() as patch:
        add(patch)
        return train_layout(Config.model_validate(values), num_steps)


def kept_with_it(values: dict[str, Any]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        add(patch)
        return kept_bytes(Config.model_validate(values))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_trains_it(layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch)
    config = tiny_config(model={"mlp": "scaled-gelu"}, parallel=layout)
    check(run_distributed(train_with_it, config.parallel.world_size, config.to_dict(), 3), train_reference(config, 3))


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_it_is_counted(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch)
    model = ModelConfig.model_validate(MODEL)
    check_inventory(model)
    counts = count_parameters(model)
    assert counts.layer_matrices == 4 * 32 * 32 + 2 * 32 * 64 and counts.layer_vectors == 2 * 32 + 64
    assert flops_per_token(model, 16) == 6 * (counts.matmul + 4 * 32 * 16)
    config = tiny_config(model={"mlp": "scaled-gelu"}, parallel={"recompute": recompute})
    want = layer_bytes_per_token(config.model, 4, recompute=config.parallel.recompute)
    assert run_distributed(kept_with_it, 1, config.to_dict()) == [want * LENGTH]
    assert "scaled-gelu" in Config.model_json_schema()["$defs"]["ModelConfig"]["properties"]["mlp"]["enum"]


def test_without_the_row_nobody_knows_it() -> None:
    with pytest.raises(ValidationError, match="there is no kind 'scaled-gelu'; known: swiglu, gelu, relu2"):
        ModelConfig.model_validate(MODEL)
    with pytest.raises(ValidationError, match="did you mean `swiglu`"):
        ModelConfig.model_validate(MODEL | {"mlp": "swigl"})
