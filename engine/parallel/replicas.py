"""Are copies still copies?

Several ranks hold what should be the same numbers: data-parallel replicas of the weights, norms on every tensor rank, a
tied embedding on the first and the last stage.  Nothing in a step would notice if they drifted apart; BLOOM's layer
norms did for weeks (BigScience's chronicles of its training).  Every so many steps the ranks compare hashes of what
they hold: `torch.hash_tensor`, one number per tensor, gathered along the axis over which it should be equal.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.distributed.collectives import all_gather
from engine.distributed.mesh import Axis
from engine.errors import OctantError
from engine.parallel.data.buckets import Bucket
from engine.parallel.parallelize import ParallelModel

Named = list[tuple[str, Tensor]]


class ReplicasDiffer(OctantError):
    """Copies that must be equal are not; the run cannot be trusted any more."""


def check_replicas(model: ParallelModel, step: int) -> None:
    """Compares everything that several ranks hold.  Every rank must call this, between two steps.

    Raises:
        ReplicasDiffer: naming the tensors and the ranks.  Every rank that sees the difference raises it.
    """
    mesh = model.mesh
    found: list[str] = []
    for bucket in model.buckets:
        copies = mesh.replicate if bucket.level else mesh.gradient
        found += _differences(_state(bucket), copies)
        if bucket.level < 3:
            found += _differences(list(_parameters(bucket)), mesh.gradient)
        if bucket.level < 3 and bucket.entries[0].spec.cut is None:
            found += _differences(list(_parameters(bucket)), mesh.tensor)
    found += _differences(_tied_ends(model), mesh.ends)
    if found:
        raise ReplicasDiffer(f"step {step}: copies that must be equal differ:\n  " + "\n  ".join(found) + "\n"
                             "restart from an earlier checkpoint; if it comes back, suspect those ranks' hardware")


def _parameters(bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
    return ((entry.spec.name, entry.parameter.detach()) for entry in bucket.entries)


def _state(bucket: Bucket) -> Named:
    """This rank's shard of the masters, named after the parameters around it."""
    first, last = bucket.entries[0].spec.name, bucket.entries[-1].spec.name
    return [(f"fp32 masters of {first} … {last}", bucket.master)]


def _tied_ends(model: ParallelModel) -> Named:
    """This rank's shard of the embedding, if another stage holds a copy."""
    return [("tied embedding", bucket.master) for bucket in model.buckets if bucket.kind.tied]


def _differences(tensors: Named, axis: Axis) -> list[str]:
    """What is not the same on all ranks of the axis, in words."""
    if axis.size == 1 or not tensors:
        return []
    mine = torch.stack([torch.hash_tensor(tensor).view(torch.int64) for _, tensor in tensors])
    everyone = all_gather(mine.unsqueeze(0), axis).tolist()
    found = []
    for column, (name, _) in enumerate(tensors):
        groups: dict[int, list[int]] = {}
        for rank, hashes in zip(axis.ranks, everyone, strict=True):
            groups.setdefault(hashes[column], []).append(rank)
        if len(groups) > 1:
            found.append(f"{name}: ranks " + " ≠ ".join(str(ranks) for ranks in groups.values()))
    return found
