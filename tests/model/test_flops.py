"""Parameter counts and FLOPs against published numbers, the model itself, and torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engine.config import AdapterConfig, ModelConfig, load_config
from engine.metrics.throughput import throughput
from engine.model.adapter import attach_adapters
from engine.model.context import Batch
from engine.model.flops import count_parameters, flops_per_token
from engine.model.transformer import Transformer

TINY = ModelConfig(num_layers=3, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=16, ffn_hidden_size=48,
                   vocab_size=101)


def preset(name: str, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path = tmp_path_factory.mktemp("preset") / "config.yaml"
    path.write_text(f"model: {{preset: {name}}}\nsteps: 1\n")
    return load_config(path).model


@pytest.mark.parametrize(("name", "total"), [
    ("llama-7b", 6_738_415_616), ("llama-13b", 13_015_864_320), ("llama-33b", 32_528_943_616),
    ("llama-65b", 65_285_660_672), ("llama2-70b", 68_976_648_192), ("llama3-8b", 8_030_261_248),
    ("llama3-70b", 70_553_706_496), ("llama3.2-1b", 1_235_814_400), ("tinyllama-1.1b", 1_100_048_384),
    ("qwen2.5-0.5b", 494_032_768),
])
def test_totals_are_those_of_the_released_models(name: str, total: int,
                                                 tmp_path_factory: pytest.TempPathFactory) -> None:
    assert count_parameters(preset(name, tmp_path_factory)).total == total


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"qkv_bias": True}, {"num_kv_heads": 4}])
def test_total_is_what_the_model_allocates(changes: dict[str, object]) -> None:
    config = TINY.model_copy(update=changes)
    with torch.device("meta"):
        model = Transformer(config)
    assert count_parameters(config).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_matmul_parameters_leave_out_the_lookup_and_keep_the_head(tied: bool) -> None:
    counts = count_parameters(TINY.model_copy(update={"tie_embeddings": tied}))
    assert counts.matmul == 3 * (32 * (4 + 2 * 2) * 16 + 64 * 32 + 3 * 32 * 48) + 101 * 32


def counted_by_torch(model: Transformer, seq_len: int, micro: int) -> tuple[int, int]:
    """Operations of a forward and a backward pass, and the tokens that they took."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    tokens = torch.randint(0, model.config.vocab_size, (seq_len, micro))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, Batch(tokens, torch.arange(seq_len).unsqueeze(1))).sum().backward()
    return counter.get_total_flops(), tokens.numel()


@pytest.mark.parametrize("num_kv_heads", [2, 4])
def test_full_count_equals_torchs_counter_over_forward_and_backward(num_kv_heads: int) -> None:
    config, seq_len, micro = TINY.model_copy(update={"num_kv_heads": num_kv_heads}), 24, 2
    model = Transformer(config)
    total, tokens = counted_by_torch(model, seq_len, micro)
    assert total == flops_per_token(config, seq_len, "full") * tokens


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["all-linear", "lm_head"]])
def test_frozen_weights_take_two_products(targets: str | list[str]) -> None:
    """As torch counts them; the lowest layer's q, k and v pass nothing on to an embedding that is frozen."""
    seq_len, micro, adapter = 24, 2, AdapterConfig(rank=4, targets=targets)           # type: ignore[arg-type]
    model = Transformer(TINY)
    attach_adapters(model, adapter)
    total, tokens = counted_by_torch(model, seq_len, micro)
    lowest = model.layers["0"].self_attention.linear_qkv
    not_passed_on = 2 * (lowest.weight.numel() + lowest.adapter.a.numel())
    counted = flops_per_token(TINY, seq_len, "full", adapter) - not_passed_on
    assert total == counted * tokens


def test_causal_counts_half_of_the_attention() -> None:
    matrices = 6 * count_parameters(TINY).matmul
    causal, full = flops_per_token(TINY, 512) - matrices, flops_per_token(TINY, 512, "full") - matrices
    assert causal == 6 * 3 * 64 * 512                        # L · (num_heads · head_dim) · s, not hidden_size
    assert full == 2 * causal


@pytest.mark.parametrize(("window", "full_every"), [(5, 0), (16, 0), (40, 0), (5, 2)])
def test_a_window_counts_the_keys_that_are_seen(window: int, full_every: int) -> None:
    """Query by query; of a causal text half a key less each, as without a window."""
    length = 16
    config = TINY.model_copy(update={"window": window, "full_every": full_every})
    keys = [sum(min(i + 0.5, each or length) for i in range(length)) / length
            for each in map(config.window_of, range(config.num_layers))]
    seen = sum(keys) / config.num_layers
    plain = ModelConfig.model_validate(TINY.model_dump())
    matrices = 6 * count_parameters(plain).matmul
    ratio = (flops_per_token(config, length) - matrices) / (flops_per_token(plain, length) - matrices)
    assert ratio == pytest.approx(seen / (length / 2), rel=0.03)


def test_llama_65b_on_a100_is_the_known_utilisation(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = preset("llama-65b", tmp_path_factory)
    causal, full = (throughput(380 * 2048, 1.0, flops_per_token(model, 2048, count), 2048, 312.0).mfu
                    for count in ("causal", "full"))
    assert causal == pytest.approx(0.485, abs=5e-4)
    assert full == pytest.approx(0.495, abs=5e-4)


@pytest.mark.parametrize(("name", "seq_len", "percent"), [("llama-65b", 2048, 2), ("llama-13b", 32768, 34)])
def test_conventions_differ_as_documented(name: str, seq_len: int, percent: int,
                                          tmp_path_factory: pytest.TempPathFactory) -> None:
    model = preset(name, tmp_path_factory)
    ratio = flops_per_token(model, seq_len, "full") / flops_per_token(model, seq_len)
    assert round(100 * (ratio - 1)) == percent
