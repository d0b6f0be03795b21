"""What all ranks must know alike: numbers, bytes and JSON over a CPU-capable group, in few messages.

gloo's own all-reduce and all-gather go round a ring: in a job of 2,048 ranks each sends thousands of messages, one
after the other.  For small data the number of rounds is what costs, so here it is the logarithm (Bruck et al. 1997):

    gather     in round k every rank holds what 2ᵏ ranks have brought, and gets as much again from the rank 2ᵏ further
    maximum    the same with one number in the place of a list, for a maximum does not mind what is counted twice
    share      gloo's broadcast, which is a tree

`torch.distributed`'s object collectives pickle; these send JSON as bytes.  `group=None` is a single process and needs
no `torch.distributed`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


def rank_in(group: Group) -> int:
    return 0 if group is None else dist.get_rank(group)


def size_of(group: Group) -> int:
    return 1 if group is None else dist.get_world_size(group)


def maximum(values: Sequence[int], group: Group) -> list[int]:
    """Element-wise maximum of some 64-bit integers over all ranks."""
    known = torch.tensor(values, dtype=torch.int64)
    for distance, _ in _rounds(size_of(group)):
        known = torch.maximum(known, _exchange(known, torch.empty_like(known), distance, group))
    return [int(v) for v in known]


def gather_bytes(data: bytes, group: Group) -> list[bytes]:
    """Everybody's bytes, by rank."""
    lengths = _gather(torch.tensor([len(data)]), [1] * size_of(group), group).tolist()
    everything = _gather(_tensor_of(data), lengths, group).numpy().tobytes()
    ends = np.cumsum(lengths)
    return [everything[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def gather_json(value: Any, group: Group) -> list[Any]:
    """Everybody's `value`, by rank."""
    return [json.loads(data) for data in gather_bytes(json.dumps(value).encode(), group)]


def gather_numbers(values: Sequence[float], group: Group) -> list[list[float]]:
    """Everybody's `values`, by rank; all bring as many, so that nothing but them is sent."""
    size = size_of(group)
    everything = _gather(torch.tensor(values, dtype=torch.float64), [len(values)] * size, group)
    return everything.view(size, len(values)).tolist()


def share_bytes(data: bytes, group: Group) -> bytes:
    """The first rank's bytes, on every rank."""
    if group is None:
        return data
    first, mine = dist.get_global_rank(group, 0), rank_in(group) == 0
    length = torch.tensor([len(data)])
    dist.broadcast(length, first, group=group)
    buffer = _tensor_of(data) if mine else torch.empty(int(length), dtype=torch.uint8)
    if len(buffer):
        dist.broadcast(buffer, first, group=group)
    return data if mine else buffer.numpy().tobytes()


def share_json(value: Any, group: Group) -> Any:
    """The first rank's `value`, on every rank."""
    return json.loads(share_bytes(json.dumps(value).encode() if rank_in(group) == 0 else b"", group))


def _rounds(size: int) -> Iterator[tuple[int, int]]:
    """How far the partners of each round are, and how many ranks' data are still wanted from them."""
    distance = 1
    while distance < size:
        yield distance, min(distance, size - distance)
        distance *= 2


def _gather(mine: Tensor, lengths: Sequence[int], group: Group) -> Tensor:
    """Everybody's one-dimensional `mine`, by rank, end to end; rank r brings `lengths[r]` elements."""
    rank, size = rank_in(group), size_of(group)
    ahead = [lengths[(rank + i) % size] for i in range(size)]      # of the rank i places further
    known = mine
    for distance, more in _rounds(size):
        buffer = known.new_empty(sum(ahead[distance : distance + more]))
        wanted = known[: sum(ahead[:more])]                        # by the partner, to whom this rank's come first
        known = torch.cat((known, _exchange(wanted, buffer, distance, group)))
    mine_first = sum(ahead[: size - rank])                         # those from this rank to the last
    return torch.cat((known[mine_first:], known[:mine_first]))


def _exchange(outgoing: Tensor, incoming: Tensor, distance: int, group: Group) -> Tensor:
    """Sends to the rank that many places before, receives from the one as many places behind."""
    rank, size = rank_in(group), size_of(group)
    assert group is not None
    to, origin = (dist.get_global_rank(group, (rank + step) % size) for step in (-distance, distance))
    work = []
    if len(incoming):
        work.append(dist.irecv(incoming, origin, group=group))
    if len(outgoing):
        work.append(dist.isend(outgoing.contiguous(), to, group=group))
    for handle in work:
        if handle is not None:
            handle.wait()
    return incoming


def _tensor_of(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
