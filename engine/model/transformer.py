"""A decoder-only transformer: LLaMA 1/2/3, Mistral, Qwen2 and 3, Arcee.

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
from engine.model.half import INIT_STD, Angles, Half, attention_of, mlp_of
from engine.model.layers import Embedding, Linear, RMSNorm, ScoreHead
from engine.model.rope import rotary_angles
from engine.model.spec import VOCABULARY, ParamSpec, new_parameter


def embedding_spec(config: ModelConfig) -> ParamSpec:
    """Spec of the token embedding, which with `tie_embeddings` is the output layer's weight too."""
    return ParamSpec("embedding.weight", (config.vocab_size, config.hidden_size), VOCABULARY, init_std=INIT_STD,
                     tied=config.tie_embeddings)


class Block(nn.Module):
    """One pre-norm transformer layer, of the kinds of halves that the configuration names."""

    def __init__(self, config: ModelConfig, index: int, operations: Operations) -> None:
        super().__init__()
        name = f"layers.{index}"
        self.input_layernorm = RMSNorm(f"{name}.input_layernorm", config.hidden_size, config.norm_eps, operations)
        self.self_attention = attention_of(config)(config, index, f"{name}.self_attention", operations)
        self.pre_mlp_layernorm = RMSNorm(f"{name}.pre_mlp_layernorm", config.hidden_size, config.norm_eps, operations)
        self.mlp = mlp_of(config)(config, index, f"{name}.mlp", operations)

    def forward(self, x_SBH: Tensor, angles: Angles, batch: Batch) -> Tensor:
        x_SBH = x_SBH + self.self_attention(self.input_layernorm(x_SBH), angles, batch)
        return x_SBH + self.mlp(self.pre_mlp_layernorm(x_SBH), angles, batch)

    @property
    def halves(self) -> tuple[tuple[RMSNorm, Half], ...]:
        """Each half with the norm in front of it."""
        return (self.input_layernorm, self.self_attention), (self.pre_mlp_layernorm, self.mlp)


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
