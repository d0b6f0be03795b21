"""What a forward pass knows besides the hidden states: positions, masks, caches.

Shape letters used by the model: S sequence (this rank's part), B micro-batch, H hidden, G key-value groups, Q query
heads per group, D head dimension, F feed-forward, V vocabulary columns, T keys.  Activations are sequence-first,
[S, B, H], so that sequence parallelism gathers and scatters along dimension 0 without a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class KeyValueCache(Protocol):
    """Keys and values of earlier tokens, for generation."""

    def append(self, layer: int, k_SBGD: Tensor, v_SBGD: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new keys and values of a layer and returns all so far: [T, B, G, D] each."""
        ...


@dataclass(frozen=True)
class Batch:
    """One microbatch on this rank.

    Attributes:
        tokens_SB: int64 token ids.
        positions_SB: int64 [S, B] or [S, 1], position of each token for rotary embedding.
        labels_SB: int64 ids of the next tokens; None when generating.
        loss_mask_SB: bool, True where a label counts; None: everywhere.
        attention_mask: bool [B or 1, 1, S, T], True where a query may look; None: causal.
        cache: keys and values of earlier tokens; None when training.
    """

    tokens_SB: Tensor
    positions_SB: Tensor
    labels_SB: Tensor | None = None
    loss_mask_SB: Tensor | None = None
    attention_mask: Tensor | None = None
    cache: KeyValueCache | None = None


def document_mask(document_ids_BS: Tensor) -> Tensor:
    """Causal mask that ends at document boundaries: [B, 1, S, S], True where query and key share a document."""
    same = document_ids_BS.unsqueeze(2) == document_ids_BS.unsqueeze(1)
    length = document_ids_BS.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document_ids_BS.device).tril()
    return (same & causal).unsqueeze(1)


def document_positions(document_ids_BS: Tensor) -> Tensor:
    """Positions that start again at 0 in every document: [S, B]."""
    length = document_ids_BS.shape[1]
    index = torch.arange(length, device=document_ids_BS.device).expand_as(document_ids_BS)
    starts = torch.ones_like(document_ids_BS, dtype=torch.bool)
    starts[:, 1:] = document_ids_BS[:, 1:] != document_ids_BS[:, :-1]
    first = torch.where(starts, index, 0).cummax(dim=1).values
    return (index - first).T.contiguous()
