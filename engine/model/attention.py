"""Causal grouped-query self-attention with rotary positions (Ainslie et al. 2023).

G key-value groups have Q query heads each; G equal to the heads is multi-head attention, G = 1 multi-query.  Query, key
and value of a group are rows of one projection, so a tensor rank's groups are a plain box of it.

With `qk_norm` queries and keys are normalised, head by head, before they are turned (Dehghani et al. 2023, Qwen3): the
scores then cannot grow with the norms of the projections.  All heads share one weight each, so every tensor rank holds
it whole and uses it on its own heads: the rule `inside`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.kernels.table import Operations
from engine.model.context import Batch
from engine.model.half import INIT_STD, Angles, Attention, Kept, residual_init_std
from engine.model.layers import Linear, RMSNorm
from engine.model.spec import INSIDE, Rule


class GroupedQueryAttention(Attention):
    """See the module docstring."""

    entrance = "linear_qkv"

    def __init__(self, config: ModelConfig, index: int, name: str, operations: Operations) -> None:
        super().__init__(config, index, name, operations)
        self.index = index
        groups, heads, dim = config.num_kv_heads, config.num_heads, config.head_dim
        self.head_shape = (heads // groups + 2, dim)
        self.linear_qkv = Linear.create(f"{name}.linear_qkv", (groups, *self.head_shape), config.hidden_size,
                                        Rule("column", 0), init_std=INIT_STD,
                                        bias=config.qkv_bias or config.attention_bias)
        self.q_layernorm = self.k_layernorm = None
        if config.qk_norm:
            self.q_layernorm = RMSNorm(f"{name}.q_layernorm", dim, config.norm_eps, operations, INSIDE)
            self.k_layernorm = RMSNorm(f"{name}.k_layernorm", dim, config.norm_eps, operations, INSIDE)
        self.linear_proj = Linear.create(f"{name}.linear_proj", (config.hidden_size,), heads * dim, Rule("row", 1),
                                         init_std=residual_init_std(config), bias=config.attention_bias)
        self.core_attention, self._split_and_rotate = operations.attention, operations.rope

    def forward(self, x_SBH: Tensor, angles: Angles, batch: Batch) -> Tensor:
        qkv = self.linear_qkv(x_SBH).unflatten(-1, (-1, *self.head_shape))
        if self.q_layernorm is not None and self.k_layernorm is not None:
            q, k, v = qkv.split((self.head_shape[0] - 2, 1, 1), dim=-2)
            qkv = torch.cat((self.q_layernorm(q), self.k_layernorm(k), v), dim=-2)
        q, k, v = self._split_and_rotate(qkv, *angles)
        if batch.cache is not None:
            k, v = batch.cache.append(self.index, k, v)
        return self.linear_proj(self.core_attention(q, k, v, batch.attention_mask))

    @classmethod
    def products(cls, config: ModelConfig, seq_len: int) -> int:
        """Scores and weighted values over half of the `seq_len` keys each."""
        return config.num_heads * config.head_dim * seq_len

    @classmethod
    def kept(cls, config: ModelConfig) -> Kept:
        """Queries, keys, values, the output, its log-sum-exps; with norms of queries and keys, what they normalise."""
        heads, groups, dim = config.num_heads, config.num_kv_heads, config.head_dim
        projection = (heads + 2 * groups) * dim
        elements = projection + heads * dim
        if not config.qk_norm:
            return Kept(elements, statistics=heads)
        return Kept(elements + projection, statistics=2 * heads + groups)
