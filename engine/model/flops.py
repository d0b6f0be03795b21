"""Parameters and floating-point operations of a model, counted from its configuration, without torch.

A matrix product of `[tokens, n]` with `[n, m]` costs `2·tokens·n·m` operations: one multiplication and one addition
for each weight and token.  Training does three such products per weight: the forward pass, the gradient of the input
and the gradient of the weight.  Hence, per token,

    matrices   = 6 · N_matmul

where N_matmul counts the weights that take part in a matrix product: the blocks and the LM head.  The input embedding
is a table look-up and costs nothing; a tied LM head still multiplies, so it counts.  Norms and biases are left out (one
part in ten thousand).

Attention multiplies activations with activations.  For one query of a layer with `h = num_heads · head_dim`, the scores
`q·k` against s keys cost `2·s·h` and the weighted sum of the values again `2·s·h`; with the backward pass (twice the
forward) that is `12·s·h`.  A causal query attends to `s/2` keys on average:

    attention  = 6 · L · h · s      causal: the operations the mathematics needs
               = 12 · L · h · s     full: what much of the literature counts (PaLM, Chowdhery et al. 2022, appendix B)

A weight that stays as it is has no gradient and takes two products.  With low-rank adapters, of N_adapter elements,

    matrices   = 4 · N_matmul + 6 · N_adapter          (a score head is trained besides, and counts 6)

which leaves it at that the lowest layer need not pass its gradient on.

Grouped-query attention shares keys and values among queries; it changes N_matmul but not the attention term, which
counts query heads.  Recomputed activations do not count: model FLOPs measure useful work, so recomputation lowers the
utilisation and never raises it.

The two conventions differ by 2 % (65B at 2k tokens) to 34 % (13B at 32k tokens), so whoever prints a number names the
one it uses.  Octant's records and console use the causal one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.config import AdapterConfig, ModelConfig
from engine.model.inventory import end_specs, layer_specs
from engine.model.kinds import attention_of, mlp_of
from engine.model.projections import adapter_elements, require_targets

AttentionCount = Literal["causal", "full"]


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model, with the true (unpadded) vocabulary.

    Attributes:
        embedding: the input embedding, `V·h`, and with it a table of positions.
        layer_matrices: the matrices of one transformer layer.
        layer_vectors: norms and biases of one transformer layer.
        num_layers: how often the layer is repeated.
        final_norm: the norm before the LM head.
        head: the LM head, `V·h`, or a score's `h`; it is the embedding itself when `tied`.
        tied: the LM head shares the embedding's weights.
    """

    embedding: int
    layer_matrices: int
    layer_vectors: int
    num_layers: int
    final_norm: int
    head: int
    tied: bool

    @property
    def total(self) -> int:
        """All parameters; tied weights are counted once."""
        layers = self.num_layers * (self.layer_matrices + self.layer_vectors)
        return self.embedding + layers + self.final_norm + (0 if self.tied else self.head)

    @property
    def matmul(self) -> int:
        """Weights that multiply every token (N_matmul): the layers' matrices and the LM head, tied or not."""
        return self.num_layers * self.layer_matrices + self.head


def count_parameters(model: ModelConfig) -> ParameterCounts:
    """Count the parameters of a model: those of one layer and of both ends (`engine.model.inventory`)."""
    layer, ends = layer_specs(model, 0).values(), {name: spec.num_elements for name, spec in end_specs(model).items()}
    matrices = sum(spec.num_elements for spec in layer if spec.decay)
    return ParameterCounts(
        embedding=ends.pop("embedding.weight") + ends.pop("position_embedding.weight", 0), layer_matrices=matrices,
        layer_vectors=sum(spec.num_elements for spec in layer) - matrices, num_layers=model.num_layers,
        final_norm=sum(ends.pop(name) for name in [*ends] if name.startswith("final_layernorm.")),
        head=sum(ends.values()), tied=model.tie_embeddings)


def products(model: ModelConfig, seq_len: int) -> int:
    """Multiply-accumulates of one layer per token among activations, forward, with causal scores counted half."""
    return attention_of(model).products(model, seq_len) + mlp_of(model).products(model, seq_len)


def count_adapter(model: ModelConfig, adapter: AdapterConfig) -> int:
    """Parameters of low-rank adapters.

    Raises:
        ConfigError: a projection is to have one that the model does not have.
    """
    require_targets(model, adapter)
    of_a_layer, of_the_ends = (adapter_elements(specs, adapter) for specs in (layer_specs(model, 0), end_specs(model)))
    return model.num_layers * of_a_layer + of_the_ends


def flops_per_token(model: ModelConfig, seq_len: int, attention: AttentionCount = "causal",
                    adapter: AdapterConfig | None = None) -> int:
    """Floating-point operations of training on one token of a sequence of `seq_len` tokens, forward and backward.

    Args:
        model: the resolved model.
        seq_len: tokens in one sequence (`s`), not the model's maximum.
        attention: `causal` counts half of the score matrix (`6·L·h·s`), `full` all of it (`12·L·h·s`).
        adapter: what is trained in place of the weights.

    Raises:
        ConfigError: a projection is to have an adapter that the model does not have.
    """
    factor, counts = 6 if attention == "causal" else 12, count_parameters(model)
    matrices = 6 * counts.matmul
    if adapter is not None:
        frozen = counts.matmul - (counts.head if model.head == "score" else 0)
        matrices += 6 * count_adapter(model, adapter) - 2 * frozen
    return matrices + factor * model.num_layers * products(model, seq_len)
