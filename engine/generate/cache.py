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

Those of several texts are copied together before.  A text that is alone mostly has blocks that are neighbours, and is
looked at where it lies.
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
        longest: keys of these blocks that are looked at.
        visible_B11T: bool, those of them that its newest token sees; None: all.
        strip: the only text's keys among those of all blocks, which lie there one behind the other; None: use the
            tables.
    """

    slots_S: Tensor
    beginnings: Documents | None
    copies_2C: Tensor | None
    tables_BN: Tensor
    longest: int
    visible_B11T: Tensor | None
    strip: slice | None


class Cache:
    """Room for so many blocks in some layers of the model."""

    def __init__(self, layers: Iterable[int], num_blocks: int, groups: int, head_dim: int, *, dtype: torch.dtype,
                 device: torch.device) -> None:
        numbers = list(layers)
        shape = (2, len(numbers), num_blocks * BLOCK_TOKENS, groups, head_dim)
        keys, values = torch.zeros(shape, dtype=dtype, device=device)        # what is masked must be finite: 0 · NaN
        self._of = dict(zip(numbers, zip(keys, values, strict=True), strict=True))

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Its keys and values, [N · 16, G, D]."""
        return self._of[layer]


class Pass:
    """The cache as one pass sees it; see `engine.model.context.KeyValueCache`."""

    def __init__(self, cache: Cache, fed: Fed) -> None:
        self._cache, self._fed = cache, fed
        self._first = 0 if fed.beginnings is None else fed.beginnings.bounds[0][-1]         # of the newest tokens
        self._newest = fed.slots_S[self._first:] if self._first else fed.slots_S

    def attend(self, layer: int, q_SBGQD: Tensor, k_SBGD: Tensor, v_SBGD: Tensor,
               attention: Callable[..., Tensor]) -> Tensor:
        """Stores keys and values and attends to those of each text; [S, 1, G·Q·D]."""
        first, fed = self._first, self._fed
        stores, begun = self._cache.of(layer), None
        if first:
            for store, new in zip(stores, (k_SBGD, v_SBGD), strict=True):
                store.index_copy_(0, fed.slots_S[:first], new[:first, 0])
            begun = attention(q_SBGQD[:first], k_SBGD[:first], v_SBGD[:first], None, fed.beginnings)
            q_SBGQD, k_SBGD, v_SBGD = (x[first:] for x in (q_SBGQD, k_SBGD, v_SBGD))
        seen = []
        for store, new in zip(stores, (k_SBGD, v_SBGD), strict=True):
            if fed.copies_2C is not None:
                blocks = store.unflatten(0, (-1, BLOCK_TOKENS))
                blocks.index_copy_(0, fed.copies_2C[1], blocks[fed.copies_2C[0]])
            store.index_copy_(0, self._newest, new.squeeze(1))
            seen.append(self._looked_at(store))
        done = attention(q_SBGQD.transpose(0, 1), *seen, fed.visible_B11T).transpose(0, 1)
        return done if begun is None else torch.cat((begun, done))

    def _looked_at(self, store: Tensor) -> Tensor:
        """What the newest tokens attend to, [T, B, G, D]."""
        fed = self._fed
        if fed.strip is not None:
            return store[fed.strip].unsqueeze(1)
        blocks = store.unflatten(0, (-1, BLOCK_TOKENS)).index_select(0, fed.tables_BN.flatten())
        return blocks.view(len(fed.tables_BN), -1, *store.shape[1:])[:, : fed.longest].transpose(0, 1)
