"""`config.json` and `generation_config.json`: our model section in Hugging Face's words, and back.

Three classes of `transformers` compute what `engine.model` computes.  Llama is written unless the model has something
that only another takes: biases on q, k and v (Qwen2), or a hidden size that is no multiple of the heads (Mistral).
Reading takes all three, and refuses by name whatever would compute something else: a setting that is passed over in
silence is a model that is quietly wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from engine.config import ModelConfig
from engine.data.tokenizer import Tokenizer
from engine.errors import CheckpointError

Json = dict[str, Any]

MODEL_TYPES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2"}
OWN_KEYS: dict[str, Json] = {"LlamaForCausalLM": {"attention_bias": False, "mlp_bias": False},
                             "MistralForCausalLM": {"sliding_window": None},
                             "Qwen2ForCausalLM": {"use_sliding_window": False}}
ROPE_KEYS = {"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
             "original_max_seq_len": "original_max_position_embeddings"}

# A setting, what is true of it where Octant computes something else, and why that is refused.
REFUSED: tuple[tuple[str, Callable[[Json], bool], str], ...] = (
    ("hidden_act", lambda c: c.get("hidden_act", "silu") not in ("silu", "swish"), "the feed-forward layer is SwiGLU"),
    ("attention_bias", lambda c: bool(c.get("attention_bias")), "it puts a bias on o_proj; biases are on q, k, v only"),
    ("mlp_bias", lambda c: bool(c.get("mlp_bias")), "the feed-forward layers have no bias"),
    ("quantization_config", lambda c: bool(c.get("quantization_config")), "weights are read as they are trained"),
    ("sliding_window", lambda c: _window(c) is not None,
     "attention reaches back to the first token.  Up to the window both are the same: with max_position_embeddings in "
     "config.json lowered to it, the model converts"),
)


def architecture(config: ModelConfig) -> str:
    """The class of `transformers` that computes this model."""
    if config.qkv_bias:
        return "Qwen2ForCausalLM"
    return "MistralForCausalLM" if config.hidden_size % config.num_heads else "LlamaForCausalLM"


def hf_config(config: ModelConfig, dtype: str, tokenizer: Tokenizer | None) -> Json:
    """`config.json`; `dtype` as in `float32`."""
    name = architecture(config)
    scaling = None
    if config.rope_scaling is not None:
        scaling = {"rope_type": "llama3",
                   **{theirs: getattr(config.rope_scaling, ours) for ours, theirs in ROPE_KEYS.items()}}
    return {
        "architectures": [name], "model_type": MODEL_TYPES[name],
        "hidden_size": config.hidden_size, "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim,
        "vocab_size": config.vocab_size, "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta, "rope_scaling": scaling, "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings, "hidden_act": "silu", "attention_dropout": 0.0,
        "initializer_range": 0.02, "use_cache": True, **OWN_KEYS[name], **special_ids(tokenizer), "torch_dtype": dtype}


def special_ids(tokenizer: Tokenizer | None) -> Json:
    """`bos_token_id` and so on; null where there is none, or `transformers` would put in Llama's."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eod_id, "pad_token_id": tokenizer.pad_id}


def generation_config(tokenizer: Tokenizer | None) -> Json:
    """`generation_config.json`: where generation ends; everything else is the user's choice."""
    return {"_from_model_config": True, **{key: value for key, value in special_ids(tokenizer).items()
                                           if value is not None}}


def read_hf_config(folder: Path) -> tuple[str, ModelConfig]:
    """The architecture and our model section of a Hugging Face folder.

    Raises:
        CheckpointError: there is no `config.json`, or Octant's model would compute something else.
    """
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as the configuration of a model: {error}") from None
    names = found.get("architectures") or []
    if len(names) != 1 or names[0] not in MODEL_TYPES:
        raise CheckpointError(f"{path}: architectures is {names}; Octant converts {', '.join(MODEL_TYPES)}")
    for key, differs, why in REFUSED:
        if differs(found):
            raise CheckpointError(f"{path}: {key} is {found.get(key)!r}, which Octant's model does not have: {why}")
    try:
        return names[0], ModelConfig.model_validate(_model_section(found, names[0], path))
    except KeyError as error:
        raise CheckpointError(f"{path}: {error.args[0]} is missing") from None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise CheckpointError(f"{path} describes no model that Octant has: {problems}") from None


def _model_section(found: Json, name: str, path: Path) -> Json:
    heads = found["num_attention_heads"]
    kv_heads = found.get("num_key_value_heads") or (heads if name == "LlamaForCausalLM" else None)
    if kv_heads is None:
        raise KeyError("num_key_value_heads")
    theta, scaling = _rope(found, path)
    return {
        "num_layers": found["num_hidden_layers"], "hidden_size": found["hidden_size"], "num_heads": heads,
        "num_kv_heads": kv_heads, "head_dim": found.get("head_dim") or found["hidden_size"] // heads,
        "ffn_hidden_size": found["intermediate_size"], "vocab_size": found["vocab_size"],
        "max_seq_len": found["max_position_embeddings"], "rope_theta": theta, "rope_scaling": scaling,
        "norm_eps": found["rms_norm_eps"], "tie_embeddings": bool(found.get("tie_word_embeddings", False)),
        "qkv_bias": name == "Qwen2ForCausalLM"}


def _rope(found: Json, path: Path) -> tuple[float, Json | None]:
    """Base and scaling; newer files put both into `rope_parameters`, older ones call `rope_type` just `type`."""
    rope: Mapping[str, Any] = found.get("rope_parameters") or found.get("rope_scaling") or {}
    theta = rope.get("rope_theta", found.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"{path}: RoPE is of the kind {kind!r} ({dict(rope)}); Octant has the plain kind and "
                              "llama3")
    if kind == "default":
        return theta, None
    return theta, {"type": "llama3", **{ours: rope[theirs] for ours, theirs in ROPE_KEYS.items()}}


def _window(found: Json) -> int | None:
    """The sliding window, where it is in use and shorter than the longest sequence."""
    in_use = {"LlamaForCausalLM": False, "MistralForCausalLM": True,
              "Qwen2ForCausalLM": bool(found.get("use_sliding_window"))}[found["architectures"][0]]
    window = found.get("sliding_window")
    return window if in_use and window is not None and window < found["max_position_embeddings"] else None
