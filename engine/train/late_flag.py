"""A number computed on the device in every step, read by the host without making it wait."""

from __future__ import annotations

import torch
from torch import Tensor


class LateFlag:
    """Hands a step's flag to the host and gives back the one of the step before.

    Reading a value that the device has just been told to compute would make the host wait for the whole step, and leave
    the device idle while the host prepares the next.  Copied into pinned memory behind the step's work, it is there
    by the time the next step has been enqueued.
    """

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._host = torch.zeros((), pin_memory=on_gpu)
        self._arrived = torch.cuda.Event() if on_gpu else None

    def exchange(self, flag: Tensor) -> bool:
        """Whether the flag before this one was set; `flag` is an fp32 scalar on the device."""
        if self._arrived is not None:
            self._arrived.synchronize()                  # returns at once before the first record
        before = bool(self._host)
        self._host.copy_(flag, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()
        return before
