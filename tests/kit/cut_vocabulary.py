"""The ranks of a cut vocabulary, played in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Out = TypeVar("Out")
Gather = Callable[[Tensor], Tensor]


def play_ranks(logits: Tensor, cut: Sequence[int], padding: float,
               run: Callable[[Tensor, int, int, Gather], Out]) -> tuple[list[Out], list[Tensor]]:
    """Output and logits of every rank.  The exchange is played by running forward twice: first all post, then all read.

    Args:
        cut: columns of each rank; what a rank has behind its own is `padding`.
        run: `(part of the logits, first column, how many, gather)` → output.
    """
    columns = max(cut) + 2
    parts = [F.pad(part, (0, columns - part.shape[-1]), value=padding).requires_grad_()
             for part in logits.split(tuple(cut), dim=-1)]
    posted: list[Tensor] = []

    def post(mine: Tensor) -> Tensor:
        posted.append(mine)
        return mine.unsqueeze(0)

    def all_ranks(gather: Gather) -> list[Out]:
        return [run(part, sum(cut[:rank]), cut[rank], gather) for rank, part in enumerate(parts)]

    all_ranks(post)
    return all_ranks(lambda mine: torch.stack(posted)), parts
