"""Which tokens of a sequence a context rank holds.

With causal attention late tokens have more to do than early ones.  So the sequence is cut into 2·C pieces, and rank i
takes piece i and piece 2C−1−i: one early and one late, the same work for everybody.

    C = 2:   | 0 | 1 | 2 | 3 |      rank 0: pieces 0 and 3      rank 1: pieces 1 and 2
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.distributed.mesh import Axis
from engine.model.context import Batch


def positions_of(rank: int, size: int, length: int, device: torch.device | str = "cpu") -> Tensor:
    """Positions in the whole sequence of the tokens that context rank `rank` of `size` holds, in its local order."""
    piece = length // (2 * size)
    early, late = torch.arange(piece, device=device), torch.arange(piece, device=device)
    return torch.cat((early + rank * piece, late + (2 * size - 1 - rank) * piece))


def whole(parts: Tensor) -> Tensor:
    """What the context ranks hold of sequences, [C, S part, …] → [S, …]."""
    size, length = parts.shape[:2]
    if size == 1:
        return parts[0]
    order = torch.cat([positions_of(rank, size, size * length, parts.device) for rank in range(size)])
    return parts.flatten(0, 1)[order.argsort()]


def context_part(batch: Batch, axis: Axis) -> Batch:
    """This context rank's tokens of a microbatch; queries of the attention mask are cut, keys stay whole."""
    if axis.size == 1:
        return batch
    mine = positions_of(axis.index, axis.size, batch.tokens_SB.shape[0], batch.tokens_SB.device)
    return batch.map(lambda field, x: x if field.sequence_dim is None else x.index_select(field.sequence_dim, mine))
