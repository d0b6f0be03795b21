"""The configuration's section `model`: the shape of the transformer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from engine.config.fields import Layers, Positive, Rate, Section, Size
from engine.config.kinds import AttentionName, MLPName


class RopeScalingConfig(Section):
    """Llama-3's stretching of RoPE: low frequencies divided by `factor`, high ones kept, a smooth ramp between."""

    type: Literal["llama3"] = "llama3"
    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_seq_len: Size


class ModelConfig(Section):
    """The transformer's shape.  `num_heads` need not times `head_dim` equal `hidden_size`."""

    num_layers: Layers
    hidden_size: Size
    num_heads: Size
    num_kv_heads: Size = Field(default_factory=lambda values: values["num_heads"])
    head_dim: Size = Field(default_factory=lambda values: values["hidden_size"] // values["num_heads"])
    ffn_hidden_size: Size
    vocab_size: Size                                         # the true one; padding for tensor parallelism is local
    max_seq_len: Size = 2048                                 # tokens
    rope_theta: Positive = 10000.0
    rope_scaling: RopeScalingConfig | None = None
    norm_eps: Rate = 1e-5
    tie_embeddings: bool = False
    attention: AttentionName = "grouped-query"               # rows of engine.config.kinds
    mlp: MLPName = "swiglu"
    qk_norm: bool = False                                    # normalise queries and keys, head by head
    qkv_bias: bool = False
    attention_bias: bool = False                             # on q, k, v and the projection behind attention
    mlp_bias: bool = False
    head: Literal["language_model", "score"] = "language_model"      # score: one number per token (reward, critic)

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads({self.num_heads}) is not a multiple of num_kv_heads({self.num_kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim({self.head_dim}) is odd; RoPE rotates pairs")
        if self.attention_bias and self.qkv_bias:
            raise ValueError("attention_bias includes qkv_bias: set one of them")
        if self.head == "score" and self.tie_embeddings:
            raise ValueError("head: score has no output layer that tie_embeddings could tie: set it to false")
        return self
