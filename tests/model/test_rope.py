"""Stretched RoPE: frequencies and lengths of `transformers`, or of the formula where it has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from engine.config import ModelConfig
from engine.model.context import Batch
from engine.model.rope import RotaryAngles, attention_factor, inverse_frequencies
from tests.kit.distributed import run_distributed
from tests.kit.layouts import check, tiny_config, train_layout
from tests.kit.models import whole_model
from tests.kit.reference import train_reference

transformers = pytest.importorskip("transformers")

SIZES = {"num_layers": 1, "hidden_size": 64, "num_heads": 2, "ffn_hidden_size": 64, "vocab_size": 32,
         "max_seq_len": 256}
DYNAMIC = {"type": "dynamic", "factor": 4.0, "original_max_seq_len": 8}
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
    cos, sin = RotaryAngles(found)(torch.tensor([[0], [7]]), torch.float32, 8)
    assert cos[0].flatten().tolist() == pytest.approx([longer] * 16) and sin[0].count_nonzero() == 0


def test_ntk_leaves_the_fastest_pair_and_slows_the_slowest_like_linear() -> None:
    plain, ntk = model(), model(rope_scaling={"type": "ntk", "factor": 4.0})
    ratio = inverse_frequencies(plain, "cpu") / inverse_frequencies(ntk, "cpu")
    assert ratio[0] == 1 and ratio[-1].item() == pytest.approx(4.0, rel=1e-5) and bool((ratio.diff() > 0).all())
    same = model(rope_theta=10000.0 * 4.0 ** (32 / 30))
    assert torch.equal(inverse_frequencies(ntk, "cpu"), inverse_frequencies(same, "cpu"))


def test_dynamic_stretches_beyond_the_original_length_as_transformers_does() -> None:
    """Frequencies; and logits of texts alone and of texts of several lengths side by side, each as if it were alone."""
    from tests.kit.hugging_face import build_twin, load_twin, twin_names

    config = tiny_config(model={"rope_scaling": DYNAMIC, "num_kv_heads": 2})
    plain = inverse_frequencies(config.model.model_copy(update={"rope_scaling": None}), "cpu")
    lengths, most = (5, 8, 9, 29), 29
    model, tokens = whole_model(config), torch.randint(0, 97, (most, len(lengths)),
                                                       generator=torch.Generator().manual_seed(3))
    weights = twin_names(dict(model.named_parameters()), config.model)
    batch = Batch(tokens, torch.arange(most).unsqueeze(1), seq_len=torch.tensor([lengths]))
    with torch.no_grad():
        together = model(tokens, batch)
        for row, length in enumerate(lengths):
            twin = build_twin(config.model, "llama")         # anew: it remembers the longest text that it has seen
            load_twin(twin, weights)
            text = tokens[:length, row : row + 1]
            expected = twin(text.T).logits[0]
            near = 1e-5 * expected.abs().max().item()
            alone = model(text, Batch(text, torch.arange(length).unsqueeze(1)))[:, 0]
            torch.testing.assert_close(alone, expected, rtol=0, atol=near)
            torch.testing.assert_close(together[:length, row], expected, rtol=0, atol=near)
            found = inverse_frequencies(config.model, "cpu", length)
            torch.testing.assert_close(found, twin.get_submodule("model.rotary_emb").inv_freq, rtol=1e-6, atol=0)
            assert torch.equal(found, plain) == (length <= 8)


def test_the_whole_sequence_s_length_decides_on_every_context_rank() -> None:
    """Of 16 tokens each rank has 8, which alone would be turned as plain RoPE turns them."""
    config = tiny_config(model={"rope_scaling": DYNAMIC, "num_kv_heads": 2}, parallel={"context": 2})
    check(run_distributed(train_layout, 2, config, 2), train_reference(config, 2))


def test_rollouts_beyond_the_original_length_are_refused_where_training_turns_them_otherwise() -> None:
    model = {"rope_scaling": DYNAMIC}
    with pytest.raises(ValidationError, match=r"data.seq_len\(16\): make it 8 or less, or take type: yarn"):
        tiny_config(model=model, run={"objective": "grpo"})


@pytest.mark.parametrize(("scaling", "message"), [
    ({"factor": 8.0}, "type: llama3 needs original_max_seq_len, low_freq_factor, high_freq_factor"),
    ({"type": "yarn", "factor": 2.0}, "type: yarn needs original_max_seq_len"),
    ({"type": "linear", "factor": 2.0, "beta_fast": 3}, "beta_fast is not of type: linear, which has factor"),
    ({"factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 4, "original_max_seq_len": 8}, "is not above"),
    ({"type": "dynamic", "factor": 2.0}, "type: dynamic needs original_max_seq_len"),
    ({"type": "longrope", "factor": 2.0}, "llama3.*linear.*ntk.*dynamic.*yarn"),
])
def test_what_does_not_go_together_is_refused(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        model(rope_scaling=scaling)
