"""Are copies still copies?

Several ranks hold what should be the same numbers: data-parallel replicas of weights and moments, norms on every tensor
rank, a tied embedding on the first and the last stage.  Nothing in a step would notice if they drifted apart; BLOOM's
layer norms did for weeks (BigScience's chronicles of its training), and a bit that flips in one rank's memory does so
at once.  So the ranks compare hashes of what they hold, before every save and as often as is asked for besides:
one number per tensor, gathered along the axis over which it should be equal, in one message.

    level    compared between all data ranks                     no copy, so nothing to compare
    0        weights, masters, moments
    1, 2     weights as the layers use them                      masters and moments, unless `zero_shard` makes copies
    3                                                            and the weights, likewise

What has no copy elsewhere is hashed when it is written, and not before.  At levels 1 and 2 a weight is compared with
what its owner sent behind the latest update: one that flips in a rank's working copy is written over by the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from engine.distributed.agree import gather_json
from engine.distributed.collectives import all_gather
from engine.distributed.mesh import Axis
from engine.errors import OctantError
from engine.parallel.data.buckets import Bucket
from engine.parallel.parallelize import ParallelModel

ROW = 63                                   # elements that a hash is made of before it is weighted

Named = list[tuple[str, Tensor]]
Moments = Mapping[str, Mapping[int, Tensor]]


class ReplicasDiffer(OctantError):
    """Copies that must be equal are not; the run cannot be trusted any more."""


def check_replicas(model: ParallelModel, step: int, moments: Moments | None = None) -> None:
    """Compares everything that several ranks hold.  Every rank must call this, between two steps.

    Raises:
        ReplicasDiffer: see `require_equal`.
    """
    require_equal(differences(model, moments or {}), step, model.mesh.world)


def require_equal(found: Sequence[str], step: int, world: Axis) -> None:
    """Tells all ranks of `world` what any has found; each must call this.

    Raises:
        ReplicasDiffer: naming the tensors and the ranks, the same on every rank.
    """
    everything = dict.fromkeys(line for lines in gather_json(list(found), world.group) for line in lines)
    if everything:
        raise ReplicasDiffer(f"step {step}: copies that must be equal differ:\n  " + "\n  ".join(everything) + "\n"
                             "restart from an earlier checkpoint; if it comes back, suspect those ranks' hardware")


def differences(model: ParallelModel, moments: Moments) -> list[str]:
    """What differs between ranks that should hold the same, in words.  Every rank of the model must call this."""
    mesh, held = model.mesh, dict[str, dict[str, Tensor]]()
    for number, bucket in enumerate(model.buckets):
        state = _state(bucket, {name: each[number] for name, each in moments.items() if number in each})
        weights = {entry.spec.name: entry.parameter.detach() for entry in bucket.entries if bucket.level < 3}
        uncut = {entry.spec.name: weights[entry.spec.name] for entry in bucket.entries
                 if bucket.level < 3 and entry.spec.cut is None}
        copied = {entry.spec.name: weights[entry.spec.name].flatten()[entry.spec.copied] for entry in bucket.entries
                  if bucket.level < 3 and bucket.kind.copied}
        tied = {"tied embedding": bucket.master} if bucket.kind.tied else {}
        for axis, tensors in ((mesh.replicate if bucket.level else mesh.gradient, state), (mesh.gradient, weights),
                              (mesh.tensor, uncut), (mesh.copies, copied), (mesh.ends, tied)):
            held.setdefault(axis.name, {}).update(tensors)
    return [line for axis in (mesh.replicate, mesh.gradient, mesh.tensor, mesh.copies, mesh.ends)
            for line in _differences(sorted(held.get(axis.name, {}).items()), axis)]


def _state(bucket: Bucket, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's shard of masters and moments; masters that are the very weights are compared as such."""
    same_memory = bucket.level < 3 and bucket.master is bucket.param_shard
    vectors = dict(moments) if same_memory else {"fp32 master": bucket.master} | dict(moments)
    places = [spec.name + ", copied" * n for spec in (e.spec for e in bucket.entries) for n in range(len(spec.held))]
    return {f"{name} of {place}": piece.tensor for name, vector in vectors.items()
            for place, piece in zip(places, bucket.pieces("", vector), strict=True)}


def _hash(vector: Tensor) -> Tensor:
    """Exclusive or over rows of an odd length, and a sum of these in which each has an odd weight of its own; of what
    is left over each element is a row.

    The one alone would not see that all elements of an even number changed alike, as those of a norm may.
    """
    whole = len(vector) // ROW * ROW
    parts = [part for part in (vector[:whole].view(-1, ROW), vector[whole:].view(-1, 1)) if part.numel()]
    if not parts:
        return vector.new_zeros((), dtype=torch.int64)
    rows = torch.cat([torch.hash_tensor(part, 1).view(torch.int64) for part in parts])
    return (rows * (2 * torch.arange(len(rows), device=rows.device) + 1)).sum()


def _differences(tensors: Named, axis: Axis) -> list[str]:
    """What is not the same on all ranks of the axis, in words."""
    if axis.size == 1 or not tensors:
        return []
    mine = torch.stack([_hash(tensor.flatten()) for _, tensor in tensors])
    everyone = all_gather(mine.unsqueeze(0), axis).tolist()
    found = []
    for column, (name, _) in enumerate(tensors):
        groups: dict[int, list[int]] = {}
        for rank, hashes in zip(axis.ranks, everyone, strict=True):
            groups.setdefault(hashes[column], []).append(rank)
        if len(groups) > 1:
            found.append(f"{name}: ranks " + " ≠ ".join(str(ranks) for ranks in groups.values()))
    return found
