"""A decoder-only transformer: what LLaMA, Mistral, Qwen, Gemma, Phi, GPT-NeoX and others are settings of.

    x = embedding(tokens)
    for each layer:   x = x + attention(norm(x));   x = x + mlp(norm(x))         or, with `residual: parallel`,
                      x = x + attention(norm(x)) + mlp(other_norm(x))            with `norm_place: post` (OLMo 2)
                      x = x + norm(attention(x));   x = x + norm(mlp(x))         and with `both` (Gemma 2)
                      x = x + norm(attention(norm(x))), likewise mlp: four norms
    logits = output(norm(x))           or, with `head: score`, one number per token: scores = score(norm(x))

`Transformer` is also what a pipeline chunk is: a chunk keeps some of the layers, the embedding only if it is the first,
norm and output layer only if it is the last.  Layers are keyed by their global index, so parameter names stay the same
under any cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pkgutil import resolve_name
from typing import Any

from torch import Tensor, nn

from engine.config import ModelConfig
from engine.kernels.table import PORTABLE, Operations
from engine.model.context import Batch
from engine.model.half import Angles, Attention, Half
from engine.model.inventory import Specs, below, end_specs, layer_specs
from engine.model.kinds import Kind, attention_of, mlp_of
from engine.model.layers import Embedding, Linear, Norm, PositionEmbedding, ScoreHead
from engine.model.parameters import new_parameter
from engine.model.rope import RotaryAngles


class Block(nn.Module):
    """One transformer layer, of the kinds of halves that the configuration names."""

    def __init__(self, config: ModelConfig, index: int, operations: Operations) -> None:
        super().__init__()
        specs = layer_specs(config, index)

        def half(name: str, kind: Kind) -> Any:
            return resolve_name(kind.computes)(config, index, below(specs, name), operations)

        def norm(name: str) -> Norm | None:
            return Norm.of(config, specs, name, operations) if f"{name}.weight" in specs else None

        self.residual, self.index = config.residual, index
        self.input_layernorm = norm("input_layernorm")
        self.self_attention: Attention = half("self_attention", attention_of(config))
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.pre_mlp_layernorm = norm("pre_mlp_layernorm")
        self.mlp: Half = half("mlp", mlp_of(config))
        self.post_mlp_layernorm = norm("post_mlp_layernorm")

    def forward(self, x_SBH: Tensor, angles: Angles, batch: Batch) -> Tensor:
        if self.post_attention_layernorm is not None and self.post_mlp_layernorm is not None:
            return self._with_norms_behind(x_SBH, angles, batch, self.post_attention_layernorm, self.post_mlp_layernorm)
        assert self.input_layernorm is not None and self.pre_mlp_layernorm is not None
        x_SBH, normalised = self.input_layernorm(x_SBH)
        attended_SBH = self.self_attention(normalised, angles, batch)
        if self.residual == "parallel":
            return x_SBH + attended_SBH + self.mlp(self.pre_mlp_layernorm(x_SBH)[1], angles, batch)
        x_SBH, normalised = self.pre_mlp_layernorm(attended_SBH, x_SBH)
        return x_SBH + self.mlp(normalised, angles, batch)

    def _with_norms_behind(self, x_SBH: Tensor, angles: Angles, batch: Batch, of_attention: Norm,
                           of_mlp: Norm) -> Tensor:
        x_SBH, normalised = (x_SBH, x_SBH) if self.input_layernorm is None else self.input_layernorm(x_SBH)
        attended = of_attention(self.self_attention(normalised, angles, batch))[1]
        if self.pre_mlp_layernorm is None:
            normalised = x_SBH = x_SBH + attended
        else:
            x_SBH, normalised = self.pre_mlp_layernorm(attended, x_SBH)
        made: Tensor = of_mlp(self.mlp(normalised, angles, batch))[1]
        return x_SBH + made

    @property
    def halves(self) -> tuple[tuple[Norm | None, Half], ...]:
        """Each half with the norm in front of it."""
        return (self.input_layernorm, self.self_attention), (self.pre_mlp_layernorm, self.mlp)


class Transformer(nn.Module):
    """The whole model, or the chunk of it that holds `layers`; `operations`: what it computes with."""

    def __init__(self, config: ModelConfig, layers: Sequence[int] | None = None, *, first: bool = True,
                 last: bool = True, operations: Operations = PORTABLE) -> None:
        super().__init__()
        self.config, self._angles = config, RotaryAngles(config)
        self._near_angles: RotaryAngles | None = None               # of layers with a window
        if config.rope_local_theta is not None:
            local = {"rope_theta": config.rope_local_theta, "rope_scaling": None}
            self._near_angles = RotaryAngles(config.model_copy(update=local))
        specs = end_specs(config)
        self.embedding = Embedding(new_parameter(specs["embedding.weight"])) if first else None
        self.position_embedding = PositionEmbedding(new_parameter(specs["position_embedding.weight"]),
                                                    config.position_offset) \
            if first and config.position == "learned" else None
        self.embedding_layernorm = Norm.of(config, specs, "embedding_layernorm", operations) \
            if first and config.embedding_norm else None
        indices = range(config.num_layers) if layers is None else layers
        self.layers = nn.ModuleDict({str(i): Block(config, i, operations) for i in indices})
        self.final_layernorm = Norm.of(config, specs, "final_layernorm", operations) if last else None
        self.output_layer = self._output_layer(specs) if last and config.head == "language_model" else None
        self.score = ScoreHead(new_parameter(specs["score.weight"])) if last and config.head == "score" else None

    def _output_layer(self, specs: Specs) -> Linear:
        """Tied, it shares the embedding's parameter or, in a chunk without the embedding, holds a copy of it."""
        if self.config.tie_embeddings and self.embedding is not None:
            return Linear(self.embedding.weight)
        return Linear.of(specs, "output_layer")

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
            if self.config.embedding_scale != 1:
                x = x * self.config.embedding_scale
            if self.position_embedding is not None:
                x = x + self.position_embedding(batch.positions_SB)
            if self.embedding_layernorm is not None:
                x = self.embedding_layernorm(x)[1]
        angles = near = self._angles(batch.positions_SB, x.dtype, batch.whole_len)
        if self._near_angles is not None:
            near = self._near_angles(batch.positions_SB, x.dtype, batch.whole_len)
        for index, layer in self.layers.items():
            x = layer(x, angles if self.config.window_of(int(index)) is None else near, batch)
        return x

    def logits(self, x_SBH: Tensor) -> Tensor:
        """Norm and output layer of the last chunk: [S, B, H] → [S, B, V]."""
        assert self.final_layernorm is not None and self.output_layer is not None
        return self.capped(self.output_layer(self.final_layernorm(x_SBH)[1]))

    def capped(self, logits: Tensor) -> Tensor:
        """What the output layer gives, within ±`logit_softcap`."""
        cap = self.config.logit_softcap
        return logits if cap is None else (logits / cap).tanh() * cap

    def through_output_layer(self, x_SBH: Tensor, instead: Callable[..., Any]) -> Any:
        """As `logits`, which are not made: `instead` is given the norm's output and the layer, and caps."""
        assert self.final_layernorm is not None and self.output_layer is not None
        return self.output_layer(self.final_layernorm(x_SBH)[1], instead)

    def scores(self, x_SBH: Tensor) -> Tensor:
        """Norm and score of the last chunk: [S, B, H] → fp32 [S, B]."""
        assert self.final_layernorm is not None and self.score is not None
        return self.score(self.final_layernorm(x_SBH)[1])
