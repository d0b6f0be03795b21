"""What all ranks must know alike: small collectives of numbers and JSON over a CPU-capable group.

`torch.distributed`'s object collectives pickle; these send JSON as bytes.  `group=None` is a single process and needs
no `torch.distributed`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

Group = dist.ProcessGroup | None


def rank_in(group: Group) -> int:
    return 0 if group is None else dist.get_rank(group)


def size_of(group: Group) -> int:
    return 1 if group is None else dist.get_world_size(group)


def maximum(values: Sequence[int], group: Group) -> list[int]:
    """Element-wise maximum of a few 64-bit integers over all ranks."""
    if group is None:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return [int(v) for v in tensor]


def gather_rows(rows: np.ndarray, most: int, group: Group) -> list[np.ndarray]:
    """Everybody's int64 array `[n, columns]`, by rank; n differs between ranks and is at most `most`."""
    if group is None:
        return [rows]
    columns = rows.shape[1]
    padded = torch.zeros(most + 1, columns, dtype=torch.int64)
    padded[0, 0] = len(rows)
    padded[1:len(rows) + 1] = torch.from_numpy(rows)
    gathered = [torch.empty_like(padded) for _ in range(size_of(group))]
    dist.all_gather(gathered, padded, group=group)
    return [part[1:int(part[0, 0]) + 1].numpy() for part in gathered]


def gather_json(value: Any, group: Group) -> list[Any]:
    """Everybody's `value`, by rank."""
    if group is None:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    [most] = maximum([len(data)], group)
    rows = gather_rows(data.astype(np.int64).reshape(-1, 1), most, group)
    return [json.loads(part.astype(np.uint8).tobytes()) for part in rows]


def share_json(value: Any, group: Group) -> Any:
    """The first rank's `value`, on every rank."""
    return gather_json(value if rank_in(group) == 0 else None, group)[0]
