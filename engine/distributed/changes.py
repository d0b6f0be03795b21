"""What has changed of a tensor since the last time, as bytes: for sending a little of what is nearly the same.

A step at a reinforcement-learning rate changes few of the bf16 weights, for most updates are smaller than half of a
weight's last bit.  Of elements whose bits differ go the place (int32) and the bits; where that would be no less than
the whole, the whole goes.  How many have changed decides it at both ends, so that number alone is sent beforehand.
"""

from __future__ import annotations

import torch
from torch import Tensor

INDEX_BYTES, ALIGNMENT = 4, 8


def size_of_changes(changed: int, elements: int, itemsize: int) -> int:
    """Bytes of an encoding; each begins where any type may."""
    size = min(changed * (INDEX_BYTES + itemsize), elements * itemsize)
    return -(-size // ALIGNMENT) * ALIGNMENT


def are_few(changed: int, elements: int, itemsize: int) -> bool:
    """Whether places and bits go instead of the whole."""
    return changed * (INDEX_BYTES + itemsize) < elements * itemsize


def places_of_changes(now: Tensor, before: Tensor) -> Tensor:
    """Flat indices of the elements that differ; both as integers."""
    return (now != before).flatten().nonzero().squeeze(1)


def encode(now: Tensor, places: Tensor, out: Tensor) -> None:
    """Fills `out`, uint8 of `size_of_changes`; `now`: as integers, any strides."""
    changed, elements, width = len(places), now.numel(), now.element_size()
    if are_few(changed, elements, width):
        out[: changed * INDEX_BYTES].view(torch.int32).copy_(places)
        values = now[torch.unravel_index(places, now.shape)]
        out[changed * INDEX_BYTES :][: changed * width].view(now.dtype).copy_(values)
    else:
        out[: elements * width].view(now.dtype).view(now.shape).copy_(now)


def apply(into: Tensor, changed: int, data: Tensor) -> None:
    """The other end; `into` has the elements as they were."""
    elements, width = into.numel(), into.element_size()
    if are_few(changed, elements, width):
        places = data[: changed * INDEX_BYTES].view(torch.int32).long()
        values = data[changed * INDEX_BYTES :][: changed * width].view(into.dtype)
        into[torch.unravel_index(places, into.shape)] = values
    else:
        into.copy_(data[: elements * width].view(into.dtype).view(into.shape))
