"""Initial weights depend on seed and name alone."""

from __future__ import annotations

import pytest
import torch

from engine.config import ModelConfig
from engine.model.parameters import initial_values, initialise, spec_of
from engine.model.spec import ParamSpec
from engine.model.transformer import Transformer

CONFIG = ModelConfig(num_layers=1, hidden_size=16, num_heads=2, ffn_hidden_size=24, vocab_size=31)


@pytest.mark.parametrize("device", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU"))])
def test_values_are_the_same_whatever_the_device(device: str) -> None:
    """Of the default device too: they are drawn on the CPU."""
    spec = ParamSpec("layers.0.mlp.linear_fc2.weight", (16, 24), Transformer(CONFIG).layers["0"].mlp.linear_fc2.weight
                     .spec.rule)
    want = initial_values(spec, 3)
    with torch.device(device):
        values = initial_values(spec, 3)
    assert values.device.type == "cpu" and torch.equal(values, want)
    assert want.std().item() == pytest.approx(spec.init_std, rel=0.1)


def test_a_model_elsewhere_gets_them_too() -> None:
    models = [Transformer(CONFIG).to(place) for place in ("cpu", "cuda" if torch.cuda.is_available() else "cpu")]
    for model in models:
        initialise(model, 3)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a.cpu(), b.cpu()), spec_of(a).name
