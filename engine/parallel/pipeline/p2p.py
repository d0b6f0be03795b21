"""Sending activations and gradients between pipeline stages.

Every message has a tag made of its microbatch, chunk and direction: with several chunks per stage two messages may be
under way between the same two ranks at once, and without tags gloo may hand them over in either order.  Both ends of a
message derive its shape from the microbatch, which all stages read; nothing is negotiated.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from engine.distributed.collectives import Work, started
from engine.distributed.mesh import Axis
from engine.schedules.action import Action, Kind


class Messenger:
    """Point-to-point messages along the pipeline axis; nothing here waits."""

    def __init__(self, axis: Axis, num_chunks: int, parts: int, width: int, dtype: torch.dtype,
                 device: torch.device) -> None:
        """A hidden state that crosses a stage boundary is [S/`parts`, B, `width`] on this rank."""
        self.axis, self.num_chunks, self.parts, self.width = axis, num_chunks, parts, width
        self.dtype, self.device = dtype, device
        self._sending: list[tuple[Work, Tensor]] = []

    def send(self, action: Action, tensor: Tensor, stage: int) -> None:
        """Starts sending; keeps the tensor only until it has left."""
        self._sending = [(work, kept) for work, kept in self._sending if not work.is_completed()]
        tensor = tensor.contiguous()
        work = dist.isend(tensor, self.axis.ranks[stage], group=self.axis.group, tag=self._tag(action))
        self._sending.append((started(work, self.axis), tensor))

    def receive(self, action: Action, stage: int, shape: tuple[int, int]) -> tuple[Tensor, Work]:
        """Posts a receive; the tensor is valid after the handle's `wait`.

        Args:
            shape: S and B of the microbatch.
        """
        length, rows = shape
        buffer = torch.empty(length // self.parts, rows, self.width, dtype=self.dtype, device=self.device)
        work = dist.irecv(buffer, self.axis.ranks[stage], group=self.axis.group, tag=self._tag(action))
        return buffer, started(work, self.axis)

    def wait_sent(self) -> None:
        """Returns when everything has left."""
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()

    def _tag(self, action: Action) -> int:
        """Same at both ends: named after the chunk that receives."""
        chunk = action.partner.chunk if action.kind in (Kind.SEND_F, Kind.SEND_B) else action.chunk
        backward = action.kind in (Kind.SEND_B, Kind.RECV_B)
        return (action.microbatch * self.num_chunks + chunk) * 2 + backward
