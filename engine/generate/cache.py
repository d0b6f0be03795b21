"""Keys and values of the tokens so far, in blocks.

Attention of token s needs the keys and values of tokens 0 … s, and those never change.  Keeping them makes the cost of
one more token a single pass over the weights and one over the cache, instead of a pass over the whole text again.

The memory is allocated once, per layer of this rank and for its key-value groups only (shape letters as in
`engine.model.context`, N blocks):

    keys   [layers, N, 16, G, D]       2 · layers · G · D elements per token with the values: for LLaMA-65B in bf16
    values [layers, N, 16, G, D]       2.6 MB, 1/8 of it on each of 8 tensor ranks

One pass feeds tokens of many texts, one behind the other as if they were one sequence, [tokens, 1]: nothing but
attention minds whose they are.  First come whole beginnings of texts, whose tokens see those of their own before them
and nothing that is cached; then one token for each text that is to go on, which sees what its table names:

    beginnings    p₀ p₁ p₂ p₃ │ p₀ p₁          stored, and attended to as documents are
    newest        a₄ │ b₂ │ c₉                 stored, then attention over the blocks of each
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.generate.blocks import BLOCK_TOKENS
from engine.kernels.documents import Documents


@dataclass(frozen=True)
class Fed:
    """Where the tokens of one pass belong.

    Attributes:
        slots_S: place of every token: block · 16 + place in it.
        beginnings: the documents that the first tokens make up; None: there are none.
        copies_2C: blocks to copy from and to before the newest tokens are stored; None: none.
        tables_BN: the blocks of every text, in order; what is behind its last does not matter.
        visible_B11T: bool, the keys of these blocks that its newest token sees.
    """

    slots_S: Tensor
    beginnings: Documents | None
    copies_2C: Tensor | None
    tables_BN: Tensor
    visible_B11T: Tensor


class Cache:
    """Room for so many blocks in some layers of the model."""

    def __init__(self, layers: Iterable[int], num_blocks: int, groups: int, head_dim: int, *, dtype: torch.dtype,
                 device: torch.device) -> None:
        self._place = {layer: place for place, layer in enumerate(layers)}
        shape = (len(self._place), num_blocks, BLOCK_TOKENS, groups, head_dim)
        self._keys = torch.zeros(shape, dtype=dtype, device=device)          # what is masked must be finite: 0 · NaN
        self._values = torch.zeros(shape, dtype=dtype, device=device)

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Its keys and values, [N, 16, G, D]."""
        return self._keys[self._place[layer]], self._values[self._place[layer]]


class Pass:
    """The cache as one pass sees it; see `engine.model.context.KeyValueCache`."""

    def __init__(self, cache: Cache, fed: Fed) -> None:
        self._cache, self._fed = cache, fed
        self._first = 0 if fed.beginnings is None else fed.beginnings.bounds[0][-1]         # of the newest tokens

    def attend(self, layer: int, q_SBGQD: Tensor, k_SBGD: Tensor, v_SBGD: Tensor,
               attention: Callable[..., Tensor]) -> Tensor:
        """Stores keys and values and attends to those of each text; [S, 1, G·Q·D]."""
        first, fed = self._first, self._fed
        stores = self._cache.of(layer)
        done = []
        if first:
            for store, new in zip(stores, (k_SBGD, v_SBGD), strict=True):
                store.flatten(0, 1).index_copy_(0, fed.slots_S[:first], new[:first, 0])
            done.append(attention(q_SBGQD[:first], k_SBGD[:first], v_SBGD[:first], None, fed.beginnings))
        length, seen = fed.visible_B11T.shape[-1], []
        for store, new in zip(stores, (k_SBGD, v_SBGD), strict=True):
            if fed.copies_2C is not None:
                store.index_copy_(0, fed.copies_2C[1], store[fed.copies_2C[0]])
            store.flatten(0, 1).index_copy_(0, fed.slots_S[first:], new[first:, 0])
            blocks = store.index_select(0, fed.tables_BN.flatten())
            seen.append(blocks.view(len(fed.tables_BN), -1, *store.shape[2:])[:, :length].transpose(0, 1))
        done.append(attention(q_SBGQD[first:].transpose(0, 1), *seen, fed.visible_B11T).transpose(0, 1))
        return torch.cat(done) if first else done[0]
