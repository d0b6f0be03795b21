"""A `transformers` twin of a configuration, and the correspondence of parameters, written out by hand.

Weights and gradients of corresponding parameters correspond the same way, so one function serves both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    ArceeConfig,
    ArceeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from engine.config import ModelConfig

FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "arcee": (ArceeConfig, ArceeForCausalLM, {"bos_token_id": None, "eos_token_id": None}),
}


def build_twin(config: ModelConfig, family: str) -> nn.Module:
    """The model of `family` with the shape of `config`, in fp32."""
    config_class, model_class, extra = FAMILIES[family]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    longest = config.max_seq_len
    if (scaling := config.rope_scaling) is not None and scaling.type == "dynamic":
        rope |= {"rope_type": "dynamic", "factor": scaling.factor}
        longest = scaling.original_max_seq_len or longest
    elif scaling is not None:
        rope |= {"rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low_freq_factor,
                 "high_freq_factor": scaling.high_freq_factor,
                 "original_max_position_embeddings": scaling.original_max_seq_len}
    if family != "qwen2" or config.head_dim != config.hidden_size // config.num_heads:
        extra = extra | {"head_dim": config.head_dim}
    if family in ("llama", "qwen3", "arcee"):
        extra = extra | {"attention_bias": config.attention_bias}
    if family in ("llama", "arcee"):
        extra = extra | {"mlp_bias": config.mlp_bias}
    if family == "mistral":
        extra = extra | {"sliding_window": config.window}
    if family == "arcee":
        extra = extra | {"hidden_act": config.mlp}
    twin_config = config_class(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, max_position_embeddings=longest,
        rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tie_embeddings, rope_parameters=rope,
        attn_implementation="sdpa", use_cache=False, **extra)
    return model_class(twin_config).float()


def twin_names(named: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our global tensors by name → the twin's tensors by its names."""
    out: dict[str, Tensor] = {}
    for name, values in named.items():
        out |= _translate(name, values, config)
    return out


def _translate(name: str, values: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    fixed = {"embedding.weight": "model.embed_tokens.weight", "final_layernorm.weight": "model.norm.weight",
             "output_layer.weight": "lm_head.weight"}
    if name in fixed:
        return {fixed[name]: values}
    _, index, rest = name.split(".", 2)
    module, kind = rest.rsplit(".", 1)
    layer = f"model.layers.{index}"
    if module == "self_attention.linear_qkv":
        queries = config.num_heads // config.num_kv_heads
        q, k, v = values.split((queries, 1, 1), dim=1)
        return {f"{layer}.self_attn.{letter}_proj.{kind}": part.flatten(0, 2)
                for letter, part in (("q", q), ("k", k), ("v", v))}
    if module == "mlp.linear_fc1":
        *gate, up = values
        named = {"up": up} | ({"gate": gate[0]} if gate else {})
        return {f"{layer}.mlp.{letters}_proj.{kind}": part for letters, part in named.items()}
    renamed = {"self_attention.q_layernorm": "self_attn.q_norm", "self_attention.k_layernorm": "self_attn.k_norm",
               "self_attention.linear_proj": "self_attn.o_proj", "mlp.linear_fc2": "mlp.down_proj",
               "input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}
    return {f"{layer}.{renamed[module]}.{kind}": values}


def load_twin(twin: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copies weights under the twin's names; every parameter must be there, and no other."""
    parameters = dict(twin.named_parameters())
    assert parameters.keys() == weights.keys(), parameters.keys() ^ weights.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            assert parameter.shape == weights[name].shape, name
            parameter.copy_(weights[name])
