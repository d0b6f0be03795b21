"""Where the documents of packed sequences begin and end: all that attention needs to stay inside them.

A mask of queries × keys would say the same in S² bytes.  Boundaries are a few numbers, known to the host before the
step begins, so that nothing is read back from the device: attention runs document by document, or in one call of a
kernel that takes boundaries (`cu_seqlens`, as the flash-attention packages call them).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """The documents of a microbatch of whole sequences.

    Attributes:
        bounds: of every row the positions 0, …, S at which documents meet.
        cu_seqlens: int32, where documents begin if the rows stand one behind the other, and the end of the last.
    """

    bounds: tuple[tuple[int, ...], ...]
    cu_seqlens: Tensor

    @staticmethod
    def of(document_ids_BS: Tensor) -> Documents:
        """From the document's number of every token, on the host."""
        length = document_ids_BS.shape[1]
        changes = document_ids_BS[:, 1:] != document_ids_BS[:, :-1]
        bounds = tuple((0, *(row.nonzero().flatten() + 1).tolist(), length) for row in changes)
        starts = [row * length + start for row, each in enumerate(bounds) for start in each[:-1]]
        return Documents(bounds, torch.tensor([*starts, len(bounds) * length], dtype=torch.int32))

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(stop - start for _, start, stop in self)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Row, first token and the end of every document."""
        for row, bounds in enumerate(self.bounds):
            for start, stop in pairwise(bounds):
                yield row, start, stop

    def lengths(self, row: int) -> Sequence[int]:
        """Tokens of the row's documents."""
        bounds = self.bounds[row]
        return [stop - start for start, stop in pairwise(bounds)]

    def rows(self, start: int, count: int) -> Documents:
        """Those of some of the rows."""
        before, own = (sum(len(each) - 1 for each in part)
                       for part in (self.bounds[:start], self.bounds[start : start + count]))
        cut = self.cu_seqlens[before : before + own + 1]
        return Documents(self.bounds[start : start + count], cut - cut[0])

    def positions(self) -> Tensor:
        """Every token's position in its document: int64 [S, B]."""
        return torch.stack([torch.cat([torch.arange(length) for length in self.lengths(row)])
                            for row in range(len(self.bounds))], dim=1)

    def mask(self, device: torch.device | str = "cpu") -> Tensor:
        """[B, 1, S, S], True where a query sees a key: the definition, for references."""
        length = self.bounds[0][-1]
        mask = torch.zeros(len(self.bounds), 1, length, length, dtype=torch.bool, device=device)
        for row, start, stop in self:
            mask[row, 0, start:stop, start:stop] = True
        return mask.tril_()

    def to(self, device: torch.device) -> Documents:
        """With `cu_seqlens` there; not waiting, if it is in pinned memory."""
        return replace(self, cu_seqlens=self.cu_seqlens.to(device, non_blocking=True))

    def pinned(self) -> Documents:
        """With `cu_seqlens` in pinned memory."""
        return replace(self, cu_seqlens=self.cu_seqlens.pin_memory())
