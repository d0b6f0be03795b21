"""What a forward pass knows besides the hidden states: positions, masks, caches.

Shape letters used by the model: S sequence (this rank's part), B micro-batch, H hidden, G key-value groups, Q query
heads per group, D head dimension, F feed-forward, V vocabulary columns, T keys.  Activations are sequence-first,
[S, B, H], so that sequence parallelism gathers and scatters along dimension 0 without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from engine.kernels.documents import Documents
from engine.model.fields import OWN, Field


class KeyValueCache(Protocol):
    """Keys and values of earlier tokens, for generation."""

    def attend(self, layer: int, q_SBGQD: Tensor, k_SBGD: Tensor, v_SBGD: Tensor,
               attention: Callable[..., Tensor]) -> Tensor:
        """Stores new keys and values of a layer; what `attention` makes of queries and all so far, [S, B, G·Q·D]."""
        ...


@dataclass(frozen=True)
class Batch:
    """One microbatch on this rank.

    Attributes:
        tokens_SB: int64 token ids.
        positions_SB: int64 [S, B] or [S, 1], position of each token for rotary embedding.
        labels_SB: int64 ids of the next tokens; None when generating.
        loss_mask_SB: bool, True where a label counts; None: everywhere.
        documents: of the whole sequences, also where this rank has a part of them; None: each is one document.
        cache: keys and values of earlier tokens; None when training.
        extra: what the objective's samples add (`Objective.fields`).
        seq_len: tokens of the whole sequences, also where this rank has a part of them or common padding is cut off;
            [1, B] where each row has a length of its own, [S, 1] where each token was fed in a sequence of another;
            None: as many as there are.
    """

    tokens_SB: Tensor
    positions_SB: Tensor
    labels_SB: Tensor | None = None
    loss_mask_SB: Tensor | None = None
    documents: Documents | None = None
    cache: KeyValueCache | None = None
    extra: Mapping[Field, Tensor] = field(default_factory=dict)
    seq_len: int | Tensor | None = None

    @property
    def whole_len(self) -> int | Tensor:
        """Tokens of the whole sequences, by which `rope_scaling: dynamic` turns them."""
        return self.tokens_SB.shape[0] if self.seq_len is None else self.seq_len

    def map(self, change: Callable[[Field, Tensor], Tensor]) -> Batch:
        """The batch with every tensor that is there replaced by what `change` makes of it, of sequences as long."""
        own: dict[str, Any] = {f.name: change(f, x) for f in OWN if (x := getattr(self, f.name)) is not None}
        return replace(self, **own, extra={f: change(f, x) for f, x in self.extra.items()}, seq_len=self.whole_len)

    def rows(self, start: int, count: int) -> Batch:
        """Some of the rows; what has one row holds for all and stays."""
        whole = self.tokens_SB.shape[1]
        cut = self.map(lambda f, x: x if x.shape[f.batch_dim] < whole else x.narrow(f.batch_dim, start, count))
        return cut if self.documents is None else replace(cut, documents=self.documents.rows(start, count))


class Batches(Sequence[Batch]):
    """The microbatches of a step; as it stands, those that are there already."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch:                # type: ignore[override]     # no slices
        return self._batches[index]

    def shape(self, index: int) -> tuple[int, int]:
        """S and B of one on this rank, which its messages have, too: known before it is asked for."""
        length, rows = self._batches[index].tokens_SB.shape
        return length, rows
