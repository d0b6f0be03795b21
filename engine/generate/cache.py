"""Keys and values of the tokens so far.

Attention of token s needs the keys and values of tokens 0 … s, and those never change.  Keeping them makes the cost of
one more token a single pass over the weights and one over the cache, instead of a pass over the whole text again.

The memory is allocated once, per layer of this rank and for its key-value groups only (shape letters as in
`engine.model.context`, T the longest text):

    keys   [layers, T, B, G, D]        2 · layers · T · B · G · D elements with the values: for LLaMA-65B in bf16
    values [layers, T, B, G, D]        2.6 MB per token, 1/8 of it on each of 8 tensor ranks

Prompts of different lengths are padded on the left, so that the newest token of every row stands at the same place,
and a mask hides the padding.  A row then sees exactly what it would see alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Cache:
    """Room for `max_tokens` tokens of `rows` texts in some layers of the model; see `KeyValueCache`."""

    def __init__(self, layers: Iterable[int], max_tokens: int, rows: int, groups: int, head_dim: int, *,
                 dtype: torch.dtype, device: torch.device) -> None:
        self._place = {layer: place for place, layer in enumerate(layers)}
        shape = (len(self._place), max_tokens, rows, groups, head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)
        self.num_tokens = 0

    def append(self, layer: int, k_SBGD: Tensor, v_SBGD: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new keys and values of a layer and returns all so far: [T, B, G, D] each, views of the cache."""
        place, stop = self._place[layer], self.num_tokens + k_SBGD.shape[0]
        self._keys[place, self.num_tokens : stop] = k_SBGD
        self._values[place, self.num_tokens : stop] = v_SBGD
        return self._keys[place, :stop], self._values[place, :stop]

    def advance(self, num_tokens: int) -> None:
        """Every layer has stored `num_tokens` more."""
        self.num_tokens += num_tokens


def visible(start: int, stop: int, padding_B: Tensor | None, device: torch.device) -> Tensor | None:
    """Which keys the queries at places start … stop - 1 may see: bool [B or 1, 1, S, T]; None: plain causal.

    Args:
        padding_B: how many places at the left of each row are padding; None: none in any row.
    """
    if padding_B is None and start == 0:
        return None
    queries = torch.arange(start, stop, device=device)[None, None, :, None]
    keys = torch.arange(stop, device=device)[None, None, None, :]
    if padding_B is None:
        return keys <= queries
    text = (keys <= queries) & (keys >= padding_B[:, None, None, None])
    return text | (keys == queries)                  # padding sees itself: a softmax over nothing would be NaN
