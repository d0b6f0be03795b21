"""Dealing layers to chunks.

Chunks are consecutive runs of layers.  A pipeline is as slow as its slowest chunk, so the largest cost is made as small
as possible, counting what the first and the last chunk do besides layers: the output layer multiplies every token with
the whole vocabulary, which for a small model with a large vocabulary is worth several layers.
"""

from __future__ import annotations

from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.model.flops import count_parameters, products


def layer_costs(config: ModelConfig, seq_len: int) -> tuple[float, float, float]:
    """Multiply-accumulates per token of (one layer, the embedding, the output layer).

    The embedding is a table look-up; it is counted as the one pass over the hidden state that it writes.
    """
    counts = count_parameters(config)
    layer = counts.layer_matrices + products(config, seq_len)
    return float(layer), float(config.hidden_size), float(counts.head)


def deal_layers(num_layers: int, num_chunks: int, *, layer: float = 1.0, embedding: float = 0.0,
                output: float = 0.0) -> list[range]:
    """The layers of every chunk, in model order, each chunk with at least one.

    Every further layer goes to the chunk that is cheapest so far, the earlier one in a tie; for identical layers this
    minimises the largest cost.

    Raises:
        ConfigError: there are more chunks than layers.
    """
    if num_layers < num_chunks:
        raise ConfigError(f"{num_layers} layers cannot fill {num_chunks} pipeline chunks (pipeline × virtual stages): "
                          "every chunk needs one")
    extra = [0.0] * num_chunks
    extra[0] += embedding
    extra[-1] += output
    counts = [1] * num_chunks
    for _ in range(num_layers - num_chunks):
        costs = [count * layer + e for count, e in zip(counts, extra, strict=True)]
        counts[costs.index(min(costs))] += 1
    starts = [sum(counts[:i]) for i in range(num_chunks)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
