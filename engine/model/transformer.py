"""A decoder-only transformer: LLaMA 1/2/3, Mistral, Qwen2.

    x = embedding(tokens)
    for each layer:   x = x + attention(norm(x));   x = x + mlp(norm(x))
    logits = output(norm(x))           or, with `head: score`, one number per token: scores = score(norm(x))

`Transformer` is also what a pipeline chunk is: a chunk keeps some of the layers, the embedding only if it is the first,
norm and output layer only if it is the last.  Layers are keyed by their global index, so parameter names stay the same
under any cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from engine.config import ModelConfig
from engine.kernels.table import PORTABLE, Operations
from engine.model.context import Batch
from engine.model.layers import Embedding, Linear, RMSNorm, ScoreHead, SwiGLU
from engine.model.rope import rotary_angles
from engine.model.spec import VOCABULARY, ParamSpec, Rule, new_parameter

INIT_STD = 0.02


def residual_init_std(config: ModelConfig) -> float:
    """Layers that write into the residual stream start smaller, by 1/√(2·layers) (Radford et al. 2019, section 2.3)."""
    return INIT_STD / (2 * config.num_layers) ** 0.5


def embedding_spec(config: ModelConfig) -> ParamSpec:
    """Spec of the token embedding, which with `tie_embeddings` is the output layer's weight too."""
    return ParamSpec("embedding.weight", (config.vocab_size, config.hidden_size), VOCABULARY, init_std=INIT_STD,
                     tied=config.tie_embeddings)


class SelfAttention(nn.Module):
    """Causal grouped-query self-attention with rotary positions."""

    def __init__(self, config: ModelConfig, index: int, name: str, operations: Operations) -> None:
        super().__init__()
        self.index = index
        groups, heads, dim = config.num_kv_heads, config.num_heads, config.head_dim
        self.head_shape = (heads // groups + 2, dim)
        self.linear_qkv = Linear.create(f"{name}.linear_qkv", (groups, *self.head_shape), config.hidden_size,
                                        Rule("column", 0), init_std=INIT_STD, bias=config.qkv_bias)
        self.linear_proj = Linear.create(f"{name}.linear_proj", (config.hidden_size,), heads * dim,
                                         Rule("row", 1), init_std=residual_init_std(config))
        self.core_attention, self._split_and_rotate = operations.attention, operations.rope

    def forward(self, x_SBH: Tensor, angles: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        qkv = self.linear_qkv(x_SBH)
        q, k, v = self._split_and_rotate(qkv.unflatten(-1, (-1, *self.head_shape)), *angles)
        if batch.cache is not None:
            k, v = batch.cache.append(self.index, k, v)
        return self.linear_proj(self.core_attention(q, k, v, batch.attention_mask))


class MLP(nn.Module):
    """SwiGLU feed-forward layer: the fused gate and up projection is [2, F, H]."""

    def __init__(self, config: ModelConfig, name: str, operations: Operations) -> None:
        super().__init__()
        self.linear_fc1 = Linear.create(f"{name}.linear_fc1", (2, config.ffn_hidden_size), config.hidden_size,
                                        Rule("column", 1), init_std=INIT_STD)
        self.activation = SwiGLU(operations)
        self.linear_fc2 = Linear.create(f"{name}.linear_fc2", (config.hidden_size,), config.ffn_hidden_size,
                                        Rule("row", 1), init_std=residual_init_std(config))

    def forward(self, x_SBH: Tensor) -> Tensor:
        return self.linear_fc2(self.activation(self.linear_fc1(x_SBH)))


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: ModelConfig, index: int, operations: Operations) -> None:
        super().__init__()
        name = f"layers.{index}"
        self.input_layernorm = RMSNorm(f"{name}.input_layernorm", config.hidden_size, config.norm_eps, operations)
        self.self_attention = SelfAttention(config, index, f"{name}.self_attention", operations)
        self.pre_mlp_layernorm = RMSNorm(f"{name}.pre_mlp_layernorm", config.hidden_size, config.norm_eps, operations)
        self.mlp = MLP(config, f"{name}.mlp", operations)

    def forward(self, x_SBH: Tensor, angles: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        x_SBH = x_SBH + self.self_attention(self.input_layernorm(x_SBH), angles, batch)
        return x_SBH + self.mlp(self.pre_mlp_layernorm(x_SBH))


class Transformer(nn.Module):
    """The whole model, or the chunk of it that holds `layers`; `operations`: what it computes with."""

    def __init__(self, config: ModelConfig, layers: Sequence[int] | None = None, *, first: bool = True,
                 last: bool = True, operations: Operations = PORTABLE) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(new_parameter(embedding_spec(config))) if first else None
        indices = range(config.num_layers) if layers is None else layers
        self.layers = nn.ModuleDict({str(i): Block(config, i, operations) for i in indices})
        self.final_layernorm = RMSNorm("final_layernorm", config.hidden_size, config.norm_eps, operations) \
            if last else None
        self.output_layer = self._output_layer() if last and config.head == "language_model" else None
        self.score = ScoreHead("score", config.hidden_size) if last and config.head == "score" else None

    def _output_layer(self) -> Linear:
        """Tied, it shares the embedding's parameter or, in a chunk without the embedding, holds a copy of it."""
        if not self.config.tie_embeddings:
            return Linear.create("output_layer", (self.config.vocab_size,), self.config.hidden_size, VOCABULARY)
        if self.embedding is not None:
            return Linear(self.embedding.weight)
        return Linear(new_parameter(replace(embedding_spec(self.config), tied_copy=True)))

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """Token ids [S, B] (first chunk) or hidden states → hidden states, or logits (last chunk), or scores."""
        x = self.hidden_states(x, batch)
        if self.output_layer is not None:
            return self.logits(x)
        return x if self.score is None else self.scores(x)

    def hidden_states(self, x: Tensor, batch: Batch) -> Tensor:
        """Token ids [S, B] or hidden states [S, B, H] → hidden states behind the last layer of this chunk."""
        if self.embedding is not None:
            x = self.embedding(x)
        angles = rotary_angles(self.config, batch.positions_SB, x.dtype)
        for layer in self.layers.values():
            x = layer(x, angles, batch)
        return x

    def logits(self, x_SBH: Tensor) -> Tensor:
        """Norm and output layer of the last chunk: [S, B, H] → [S, B, V]."""
        assert self.final_layernorm is not None and self.output_layer is not None
        return self.output_layer(self.final_layernorm(x_SBH))

    def scores(self, x_SBH: Tensor) -> Tensor:
        """Norm and score of the last chunk: [S, B, H] → fp32 [S, B]."""
        assert self.final_layernorm is not None and self.score is not None
        return self.score(self.final_layernorm(x_SBH))
