"""Parameters and floating-point operations of a model, counted from its configuration.

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

AttentionCount = Literal["causal", "full"]


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model, with the true (unpadded) vocabulary.

    Attributes:
        embedding: the input embedding, `V·h`.
        layer_matrices: the matrices of one transformer layer.
        layer_vectors: norms and biases of one transformer layer.
        num_layers: how often the layer is repeated.
        final_norm: the norm before the LM head, `h`.
        head: the LM head, `V·h`; it is the embedding itself when `tied`.
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
    """Count the parameters of a Llama-family decoder (SwiGLU, RMSNorm, grouped-query attention)."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    query_size = model.num_heads * model.head_dim
    qkv_size = query_size + 2 * model.num_kv_heads * model.head_dim
    return ParameterCounts(
        embedding=model.vocab_size * hidden,
        layer_matrices=hidden * qkv_size + query_size * hidden + 3 * hidden * ffn,
        layer_vectors=2 * hidden + (qkv_size if model.qkv_bias else 0),
        num_layers=model.num_layers,
        final_norm=hidden,
        head=model.vocab_size * hidden,
        tied=model.tie_embeddings,
    )


def count_adapter(model: ModelConfig, adapter: AdapterConfig) -> int:
    """Parameters of low-rank adapters: `rank · (in + out)` for each projection that has one."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    sizes = {"q_proj": hidden + queries, "k_proj": hidden + keys, "v_proj": hidden + keys, "o_proj": queries + hidden,
             "gate_proj": hidden + ffn, "up_proj": hidden + ffn, "down_proj": ffn + hidden}
    of_a_layer = sum(size for name, size in sizes.items() if adapter.adapts(name))
    of_the_head = hidden + model.vocab_size if adapter.adapts("lm_head") else 0
    return adapter.rank * (model.num_layers * of_a_layer + of_the_head)


def flops_per_token(model: ModelConfig, seq_len: int, attention: AttentionCount = "causal") -> int:
    """Floating-point operations of training on one token of a sequence of `seq_len` tokens, forward and backward.

    Args:
        model: the resolved model.
        seq_len: tokens in one sequence (`s`), not the model's maximum.
        attention: `causal` counts half of the score matrix (`6·L·h·s`), `full` all of it (`12·L·h·s`).
    """
    factor = 6 if attention == "causal" else 12
    query_size = model.num_heads * model.head_dim
    return 6 * count_parameters(model).matmul + factor * model.num_layers * query_size * seq_len
