"""Causal grouped-query self-attention with rotary positions (Ainslie et al. 2023).

G key-value groups have Q query heads each; G equal to the heads is multi-head attention, G = 1 multi-query.  Query, key
and value of a group are rows of one projection, so a tensor rank's groups are a plain box of it.  Where there are more
ranks than groups, those that share one divide its queries, and each has a copy of its key and value.

With `qk_norm` queries and keys are normalised, head by head, before they are turned (Dehghani et al. 2023, Qwen3): the
scores then cannot grow with the norms of the projections.  All heads share one weight each, so every tensor rank holds
it whole and uses it on its own heads: the rule `inside`.  With `qk_norm: projection` all heads are normalised together
(OLMo 2), by the mean over all ranks' heads, with a weight for each element, cut as the projection is.

With `window` a token sees so many tokens, itself the last of them (Beltagy et al. 2020; Mistral 7B); what lies further
back reaches it through the layers.  With `attention_softcap` scores stay within ±cap (Gemma 2).
With `position: alibi` nothing turns, and scores fall with the distance of the key, in each head faster than in the next
(Press et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.kernels.table import Operations
from engine.model.context import Batch
from engine.model.half import Angles, Attention
from engine.model.inventory import Specs
from engine.model.layers import Linear, Norm, ProjectionNorm
from engine.model.parameters import spec_of

Split = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def rotating(whole_heads: Split) -> Split:
    """Queries, keys and values of a fused projection, of which only so many dimensions turn as there are angles for."""
    def split(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        turned = 2 * cos.shape[-1]
        if turned == qkv.shape[-1]:
            return whole_heads(qkv, cos, sin)
        still = qkv[..., turned:]
        parts = still[..., :-2, :], still[..., -2, :], still[..., -1, :]
        if not turned:
            return parts
        turning = whole_heads(qkv[..., :turned], cos, sin)
        q, k, v = (torch.cat(pair, dim=-1) for pair in zip(turning, parts, strict=True))
        return q, k, v

    return split


class GroupedQueryAttention(Attention):
    """See the module docstring."""

    entrance = "linear_qkv"

    def __init__(self, config: ModelConfig, index: int, specs: Specs, operations: Operations) -> None:
        super().__init__(config, index, specs, operations)
        self.index, self.window = index, config.window_of(index)
        self.linear_qkv, self.linear_proj = Linear.of(specs, "linear_qkv"), Linear.of(specs, "linear_proj")
        self.q_layernorm = self.k_layernorm = None
        if config.qk_norm:
            made = ProjectionNorm.of if config.qk_norm == "projection" else Norm.of
            self.q_layernorm, self.k_layernorm = (
                made(config, specs, name, operations) for name in ("q_layernorm", "k_layernorm"))
        scalar = config.query_pre_attn_scalar
        self.longer = None if scalar in (None, config.head_dim) else (config.head_dim / scalar) ** 0.5
        self.options = {key: value for key, value in (("window", self.window), ("softcap", config.attention_softcap))
                        if value is not None}
        self.alibi, self.num_heads = config.position == "alibi", config.num_heads
        self.core_attention, self._split_and_rotate = operations.attention, rotating(operations.rope)

    def forward(self, x_SBH: Tensor, angles: Angles, batch: Batch) -> Tensor:
        heads, dim = self.linear_qkv.weight.shape[1:3]          # of a group, on this rank: queries, a key and a value
        qkv = self.linear_qkv(x_SBH).unflatten(-1, (-1, heads, dim))
        if self.q_layernorm is not None and self.k_layernorm is not None:
            q, k, v = qkv.split((heads - 2, 1, 1), dim=-2)
            qkv = torch.cat((self.q_layernorm(q)[1], self.k_layernorm(k)[1], v), dim=-2)
        q, k, v = self._split_and_rotate(qkv, *angles)
        if self.longer is not None:
            q = q * self.longer
        options = self.options | {"slopes": self._slopes(q)} if self.alibi else self.options
        attention = partial(self.core_attention, **options) if options else self.core_attention
        if batch.cache is not None:
            return self.linear_proj(batch.cache.attend(self.index, q, k, v, attention))
        return self.linear_proj(attention(q, k, v, None, batch.documents))

    def _slopes(self, q_SBGQD: Tensor) -> Tensor:
        """Of this rank's heads."""
        (group, row, *_), count = spec_of(self.linear_qkv.weight).held[0][0].offset, q_SBGQD.shape[2:4].numel()
        first = group * (spec_of(self.linear_qkv.weight).shape[1] - 2) + row
        return alibi_slopes(self.num_heads)[first : first + count].to(q_SBGQD.device)


def alibi_slopes(num_heads: int) -> Tensor:
    """2^(−8/n), 2^(−16/n) …, where n heads are a power of two; else those of the power below, and for the rest every
    other one of the power above (Press et al. 2022, and their code)."""
    power = 1 << (num_heads.bit_length() - 1)
    exponents = [*(8 * (i + 1) / power for i in range(power)),
                 *(4 * (2 * i + 1) / power for i in range(num_heads - power))]
    return torch.tensor([2**-exponent for exponent in exponents])
