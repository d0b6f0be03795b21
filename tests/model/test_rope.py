"""Stretched RoPE: frequencies and lengths of `transformers`, or of the formula where it has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from engine.config import ModelConfig
from engine.model.rope import RotaryAngles, attention_factor, inverse_frequencies

transformers = pytest.importorskip("transformers")

SIZES = {"num_layers": 1, "hidden_size": 64, "num_heads": 2, "ffn_hidden_size": 64, "vocab_size": 32,
         "max_seq_len": 256}
YARN = {"type": "yarn", "factor": 8.0, "original_max_seq_len": 32}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "yarn": (YARN, {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}),
    "yarn, everything stated": (
        YARN | {"beta_fast": 24.0, "beta_slow": 2.0, "attention_factor": 1.5},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 24.0,
         "beta_slow": 2.0, "attention_factor": 1.5}),
    "llama3": ({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 32},
               {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32}),
}


def model(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate(SIZES | changes)


@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_are_those_of_transformers(kind: str, base: float) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    ours, theirs = KINDS[kind]
    config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=256,
                                      rope_parameters=theirs | {"rope_theta": base})
    expected, longer = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, torch.device("cpu"))
    found = model(rope_theta=base, rope_scaling=ours)
    torch.testing.assert_close(inverse_frequencies(found, "cpu"), expected, rtol=1e-6, atol=0)
    assert attention_factor(found) == pytest.approx(longer)
    cos, sin = RotaryAngles(found)(torch.tensor([[0], [7]]), torch.float32)
    assert cos[0].flatten().tolist() == pytest.approx([longer] * 16) and sin[0].count_nonzero() == 0


def test_ntk_leaves_the_fastest_pair_and_slows_the_slowest_like_linear() -> None:
    plain, ntk = model(), model(rope_scaling={"type": "ntk", "factor": 4.0})
    ratio = inverse_frequencies(plain, "cpu") / inverse_frequencies(ntk, "cpu")
    assert ratio[0] == 1 and ratio[-1].item() == pytest.approx(4.0, rel=1e-5) and bool((ratio.diff() > 0).all())
    same = model(rope_theta=10000.0 * 4.0 ** (32 / 30))
    assert torch.equal(inverse_frequencies(ntk, "cpu"), inverse_frequencies(same, "cpu"))


@pytest.mark.parametrize(("scaling", "message"), [
    ({"factor": 8.0}, "type: llama3 needs original_max_seq_len, low_freq_factor, high_freq_factor"),
    ({"type": "yarn", "factor": 2.0}, "type: yarn needs original_max_seq_len"),
    ({"type": "linear", "factor": 2.0, "beta_fast": 3}, "beta_fast is not of type: linear, which has factor"),
    ({"factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 4, "original_max_seq_len": 8}, "is not above"),
    ({"type": "dynamic", "factor": 2.0}, "llama3.*linear.*ntk.*yarn"),
])
def test_what_does_not_go_together_is_refused(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        model(rope_scaling=scaling)
