"""The global gradient norm, and clipping by it.

Every element of the model counts once: each shard in one of its copies, and nothing for replicas (norms on tensor
ranks above the first, the output layer's copy of a tied embedding).  The sum of squares and the loss travel in the same
all-reduce over all ranks, the only collective of a step that involves everybody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.distributed.collectives import all_reduce
from engine.distributed.mesh import Mesh
from engine.parallel.data.buckets import Bucket


@dataclass(frozen=True)
class StepSums:
    """Totals of a step, on every rank, on the device: fp32 scalars."""

    loss_sum: Tensor
    grad_norm: Tensor
    flag: Tensor


def squared_norm(buckets: Sequence[Bucket], mesh: Mesh) -> Tensor:
    """This rank's part of the squared gradient norm, fp32 scalar."""
    counted = [bucket.grad_shard for bucket in buckets if bucket.kind.counted and bucket.is_first_copy]
    if not counted:
        return torch.zeros((), dtype=torch.float32, device=mesh.device)
    return torch.stack([torch.linalg.vector_norm(grad) for grad in counted]).square().sum()


def sum_over_world(loss: Tensor | None, buckets: Sequence[Bucket], mesh: Mesh, flag: bool = False) -> StepSums:
    """Adds up loss and gradient norm over all ranks.

    Args:
        loss: this rank's summed loss; None on ranks without the last chunk, and tensor peers share one.
        buckets: with their reductions finished; none where only the loss matters.
        mesh: all ranks call this.
        flag: something any rank may want to tell all others, such as a request to stop; they are counted.
    """
    nothing = torch.zeros((), device=mesh.device)
    mine = loss.float() if loss is not None and mesh.tensor.index == 0 else nothing
    totals = torch.stack((mine, squared_norm(buckets, mesh), nothing + float(flag)))
    all_reduce(totals, mesh.world)
    return StepSums(totals[0], totals[1].sqrt(), totals[2])


def clip_divisor(grad_norm: Tensor, max_norm: float) -> Tensor:
    """What gradients are divided by so that their norm is at most `max_norm` (0: no limit)."""
    if max_norm == 0:
        return torch.ones_like(grad_norm)
    return (grad_norm / max_norm).clamp(min=1.0)
