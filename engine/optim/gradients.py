"""The global gradient norm, and clipping by it.

Every element of the model counts once: a bucket's shard on each data rank, nothing for replicas (norms on tensor ranks
above the first, the output layer's copy of a tied embedding).  The sum of squares and the loss travel in the same
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
    """Totals of a step, on every rank, on the device."""

    loss_sum: Tensor
    grad_norm: Tensor


def squared_norm(buckets: Sequence[Bucket], mesh: Mesh) -> Tensor:
    """This rank's part of the squared gradient norm, fp32 scalar."""
    counted = [b.grad_shard for b in buckets if b.kind.counted and (b.level > 0 or mesh.gradient.index == 0)]
    if not counted:
        return torch.zeros((), dtype=torch.float32, device=mesh.device)
    return torch.stack([torch.linalg.vector_norm(grad) for grad in counted]).square().sum()


def sum_over_world(loss: Tensor | None, buckets: Sequence[Bucket], mesh: Mesh) -> StepSums:
    """Adds up loss and gradient norm; `loss` is None on ranks without the last chunk, and tensor peers share one."""
    mine = loss if loss is not None and mesh.tensor.index == 0 else torch.zeros((), device=mesh.device)
    totals = torch.stack((mine.float(), squared_norm(buckets, mesh)))
    all_reduce(totals, mesh.world)
    return StepSums(totals[0], totals[1].sqrt())


def clip_divisor(grad_norm: Tensor, max_norm: float) -> Tensor:
    """What gradients are divided by so that their norm is at most `max_norm` (0: no limit)."""
    if max_norm == 0:
        return torch.ones_like(grad_norm)
    return (grad_norm / max_norm).clamp(min=1.0)
