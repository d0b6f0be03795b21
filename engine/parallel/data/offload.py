"""Memory of a model that has nothing to do, in host memory until it has.

    at work     storages on the device, all views of them alive
    idle        storages of size 0; what they held is in host buffers, pinned for a GPU and allocated once

As in `engine.parallel.data.flat`, a storage is resized and not replaced, so that parameters, shards and pieces are the
same tensors before and after.  What nobody has written to since it came from the host is not copied there again; what
is made anew at each use (gradients, weights that are about to be received) is not copied at all.

On a GPU copies run on a stream of their own.  On the way out the next model need not wait for it: the allocator gives
the memory out again once the copy has read it.  On the way in the model's own work waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from engine.parallel.data.flat import allocate, free


class Offload:
    """Some tensors, each the whole of its storage, that may be in host memory.

    Attributes:
        idle: they are.
    """

    def __init__(self, kept: Iterable[Tensor], dropped: Iterable[Tensor] = ()) -> None:
        """
        Args:
            kept: come back with their values.
            dropped: come back as zeros.  Of both, one that shares a storage with an earlier one is left out.
        """
        self._kept = {_storage_of(tensor): tensor.detach() for tensor in reversed([*kept])}
        self._dropped = [*{_storage_of(tensor): tensor.detach() for tensor in reversed([*dropped])}.values()]
        self._host: dict[int, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self.idle = False

    @contextmanager
    def at_work(self, writes: bool) -> Iterator[None]:
        """They are on the device inside; `writes`: and may be others behind it."""
        if not self.idle:
            yield
            return
        self._wake()
        try:
            yield
        finally:
            self.rest(writes)

    @torch.no_grad()
    def rest(self, changed: bool = True) -> None:
        """Frees the device's memory."""
        with self._beside():
            for storage, tensor in self._kept.items():
                if storage not in self._host:
                    self._host[storage] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
                if changed:
                    self._host[storage].copy_(tensor, non_blocking=True)
                    if self._stream is not None:
                        tensor.record_stream(self._stream)
        for tensor in (*self._kept.values(), *self._dropped):
            free(tensor)
        self.idle = True

    @torch.no_grad()
    def _wake(self) -> None:
        for tensor in (*self._kept.values(), *self._dropped):
            allocate(tensor)
        with self._beside():
            for storage, tensor in self._kept.items():
                tensor.copy_(self._host[storage], non_blocking=True)
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        for tensor in self._dropped:
            tensor.zero_()
        self.idle = False

    def now(self, tensor: Tensor) -> Tensor:
        """Where the values of a tensor that they are, or that is a view of one, are now."""
        host = self._host.get(_storage_of(tensor)) if self.idle else None
        if host is None:
            return tensor
        if self._stream is not None:
            self._stream.synchronize()
        return host.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _beside(self) -> AbstractContextManager[object]:
        """On a GPU, in the stream of copies, which begins behind what the device has been given to do so far."""
        first = next(iter(self._kept.values()), None)
        if first is None or not first.is_cuda:
            return nullcontext()
        self._stream = self._stream or torch.cuda.Stream(first.device)
        self._stream.wait_stream(torch.cuda.current_stream(first.device))
        return torch.cuda.stream(self._stream)


def _storage_of(tensor: Tensor) -> int:
    """Which storage it is in."""
    return tensor.untyped_storage()._cdata
