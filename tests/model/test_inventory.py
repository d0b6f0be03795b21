"""What is said of a model's parameters without torch is what the model has: of every kind, combination and preset."""

from __future__ import annotations

from itertools import chain, product
from typing import Any

import pytest
import torch

from engine.config import ModelConfig
from engine.config.kinds import ATTENTIONS, MLPS, NORMS
from engine.config.load import preset_fields, preset_names
from engine.model.flops import count_parameters
from engine.model.inventory import end_specs, layer_specs
from engine.model.layers import Embedding, Linear
from engine.model.parameters import spec_of
from engine.model.transformer import Transformer

SWITCHES = ("qk_norm", "qkv_bias", "attention_bias", "mlp_bias", "tie_embeddings")
SIZES = {"num_layers": 2, "hidden_size": 24, "num_heads": 4, "ffn_hidden_size": 40, "vocab_size": 97}


def combinations() -> list[ModelConfig]:
    """All that a configuration allows."""
    models = []
    for attention, mlp, groups, wide, *on in product(ATTENTIONS, MLPS, (4, 2, 1), (False, True),
                                                     *[(False, True)] * len(SWITCHES)):
        switches = dict(zip(SWITCHES, on, strict=True))
        if not (switches["qkv_bias"] and switches["attention_bias"]):
            models.append(ModelConfig.model_validate(SIZES | switches | {
                "attention": attention, "mlp": mlp, "num_kv_heads": groups, "head_dim": 10 if wide else 6}))
    for norm, residual, position in product(NORMS, ("sequential", "parallel"), ("rope", "learned")):
        models.append(ModelConfig.model_validate(SIZES | {
            "norm": norm, "residual": residual, "position": position, "position_offset": 2 * (position == "learned"),
            "rope_share": 0.5, "head_dim": 8, "embedding_scale": 3.0, "qk_norm": norm != "layernorm"}))
    return [*models, ModelConfig.model_validate(SIZES | {"head": "score"})]


def check_inventory(config: ModelConfig) -> None:
    """Names, shapes and all else of every spec; and the sums that are made of them, parameter by parameter."""
    with torch.device("meta"):
        model = Transformer(config)
    specs = [*end_specs(config).values(), *chain(*(layer_specs(config, i).values() for i in range(config.num_layers)))]
    parameters = {name: (spec_of(parameter), tuple(parameter.shape)) for name, parameter in model.named_parameters()}
    assert parameters == {spec.name: (spec, spec.shape) for spec in specs if not spec.tied_copy}
    counts, multiplied = count_parameters(config), 0
    for module in model.modules():
        if isinstance(module, Linear) or module is model.score:
            multiplied += module.weight.numel()
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    assert counts.matmul == multiplied
    positions = 0 if model.position_embedding is None else model.position_embedding.weight.numel()
    assert isinstance(model.embedding, Embedding) and counts.embedding == model.embedding.weight.numel() + positions


def test_every_combination() -> None:
    for config in combinations():
        check_inventory(config)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset(name: str) -> None:
    fields: dict[str, Any] = {**preset_fields(name)}
    check_inventory(ModelConfig.model_validate(fields))


@pytest.mark.parametrize("tied", [False, True])
def test_a_last_chunk_has_its_copy_of_a_tied_weight(tied: bool) -> None:
    config = ModelConfig.model_validate(SIZES | {"tie_embeddings": tied})
    with torch.device("meta"):
        chunk = Transformer(config, layers=[1], first=False)
    ends = end_specs(config)
    assert {spec_of(parameter) for parameter in chunk.parameters()} == {
        *layer_specs(config, 1).values(), ends["final_layernorm.weight"], ends["output_layer.weight"]}
