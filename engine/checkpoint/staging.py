"""Host memory that a background save reads while training goes on changing the tensors.

One flat buffer, kept between saves: pinned where the tensors are on a GPU (so the copy runs at bus speed and
without the CPU), and already mapped from the second save on (a first touch costs more than the copy).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

ALIGNMENT = 64


class Staging:
    """A reusable buffer for copies of a list of tensors."""

    def __init__(self, threads: int) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="checkpoint-copy")

    def copy(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies of `tensors` in host memory, finished when this returns; valid until the next call."""
        places, total = [], 0
        for tensor in tensors:
            places.append(total)
            total += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        pinned = any(tensor.is_cuda for tensor in tensors)
        if self._buffer.numel() < total or (pinned and not self._buffer.is_pinned()):
            self._buffer = torch.empty(0, dtype=torch.uint8)        # frees the old one before making the new one
            self._buffer = torch.empty(total, dtype=torch.uint8, pin_memory=pinned)
        copies = [self._place(tensor, start) for tensor, start in zip(tensors, places, strict=True)]
        self._fill(copies, tensors)
        return copies

    def _place(self, tensor: torch.Tensor, start: int) -> torch.Tensor:
        size = tensor.numel() * tensor.element_size()
        return self._buffer[start:start + size].view(tensor.dtype).view(tensor.shape)

    def _fill(self, copies: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> None:
        def fill(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
            pair[0].copy_(pair[1].detach(), non_blocking=pair[1].is_cuda)

        on_host = [(c, t) for c, t in zip(copies, tensors, strict=True) if not t.is_cuda]
        on_device = [(c, t) for c, t in zip(copies, tensors, strict=True) if t.is_cuda]
        for pair in on_device:
            fill(pair)
        list(self._pool.map(fill, on_host))
        for device in {t.device for _, t in on_device}:
            torch.cuda.current_stream(device).synchronize()
