"""Small models of every kind, as checkpoints with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from checkpoints_tools.names import PREFIX, parameter_shapes
from engine.checkpoint.read import CheckpointReader
from engine.checkpoint.shard import Entry
from engine.checkpoint.stream import spread, write_checkpoint
from engine.config import ModelConfig
from engine.distributed.boxes import Box
from engine.distributed.random import generator_for

SHAPE = {"num_layers": 2, "hidden_size": 48, "num_heads": 4, "num_kv_heads": 4, "head_dim": 12, "ffn_hidden_size": 80,
         "vocab_size": 256, "max_seq_len": 128}
LLAMA3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 32}

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "grouped": {"num_kv_heads": 2},
    "one key-value head": {"num_kv_heads": 1, "num_layers": 11},
    "tied": {"tie_embeddings": True},
    "biased": {"qkv_bias": True, "num_kv_heads": 2, "norm_eps": 1e-6},
    "biased and tied": {"qkv_bias": True, "tie_embeddings": True, "rope_theta": 1e6},
    "odd vocabulary": {"vocab_size": 263},
    "scaled rotation": {"rope_scaling": LLAMA3, "rope_theta": 500000.0, "num_kv_heads": 2},
    "dynamic rotation": {"rope_scaling": {"type": "dynamic", "factor": 4.0, "original_max_seq_len": 32}},
    "wide heads": {"head_dim": 32, "num_kv_heads": 2},
    "heads that do not divide": {"num_heads": 5, "num_kv_heads": 5, "head_dim": 10},
    "all biases": {"attention_bias": True, "mlp_bias": True, "num_kv_heads": 2},
    "qk-norm": {"qk_norm": True, "num_kv_heads": 2, "head_dim": 16, "rope_theta": 1e6},
    "qk-norm, biased and tied": {"qk_norm": True, "attention_bias": True, "tie_embeddings": True},
    "relu2": {"mlp": "relu2", "num_kv_heads": 2},
    "phi3": {"rope_share": 0.5, "num_kv_heads": 2},
    "gemma": {"norm": "rmsnorm-1p", "mlp": "geglu", "embedding_scale": 48**0.5, "tie_embeddings": True},
    "starcoder2": {"norm": "layernorm", "mlp": "gelu-tanh", "attention_bias": True, "mlp_bias": True,
                   "num_kv_heads": 1},
    "gpt-neox": {"norm": "layernorm", "mlp": "gelu", "attention_bias": True, "mlp_bias": True, "residual": "parallel",
                 "rope_share": 0.5},
    "gpt2": {"norm": "layernorm", "mlp": "gelu-tanh", "attention_bias": True, "mlp_bias": True, "position": "learned"},
    "opt": {"norm": "layernorm", "mlp": "relu", "attention_bias": True, "mlp_bias": True, "position": "learned",
            "position_offset": 2, "tie_embeddings": True},
    "gelu, all biases": {"mlp": "gelu", "attention_bias": True, "mlp_bias": True},
}
MEGATRON_KINDS = {**{kind: KINDS[kind] for kind in ("grouped", "tied", "biased", "odd vocabulary", "wide heads")},
                  "scaled rotation": {"rope_scaling": LLAMA3 | {"original_max_seq_len": 8192}, "rope_theta": 500000.0}}


def model(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate(SHAPE | changes)


def write_random(path: Path, config: ModelConfig, tokenizer: str | None = None, num_files: int = 3,
                 dtype: torch.dtype = torch.float32, data: dict[str, Any] | None = None) -> CheckpointReader:
    """A checkpoint of `config`, as a run would save it; norms and biases are random, too, so that none can be lost."""
    entries = [Entry(PREFIX + name, shape, Box.whole(shape), dtype) for name, shape in parameter_shapes(config).items()]
    metadata = {"config": {"model": config.model_dump(mode="json"), "data": {"tokenizer": tokenizer}},
                "data": data or {}}
    write_checkpoint(path, 7, metadata, spread(entries, num_files), random_block)
    return CheckpointReader(path)


def random_block(entry: Entry) -> torch.Tensor:
    """The block of an entry out of the tensor that its key alone determines."""
    generator = generator_for(1, "test", entry.key)
    values = torch.empty(entry.global_shape).normal_(0.0, 0.3, generator=generator)
    return values[entry.box.slices].to(entry.dtype)
