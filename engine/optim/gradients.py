"""The global gradient norm, and clipping by it.

Every element of the model counts once: each shard in one of its copies, and nothing for replicas (norms on tensor
ranks above the first, the output layer's copy of a tied embedding).  The sum of squares and the loss travel in the same
all-reduce over all ranks, the only collective of a step that involves everybody.  A reproducible run gathers the
summands over the data-parallel ranks first, and adds them in one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.distributed.collectives import all_gather, all_reduce
from engine.distributed.mesh import Mesh
from engine.parallel.data.buckets import ALIGNMENT, Bucket


@dataclass(frozen=True)
class StepSums:
    """Totals of a step, on every rank, on the device: fp32 scalars."""

    loss_sum: Tensor
    grad_norm: Tensor
    flag: Tensor


def sum_over_world(losses: Tensor | None, buckets: Sequence[Bucket], mesh: Mesh, *, flag: bool = False,
                   reproducible: bool = False) -> StepSums:
    """Adds up loss and gradient norm over all ranks.

    Args:
        losses: summed loss of each of this rank's microbatches; None on ranks without the last chunk.
        buckets: with their reductions finished; none where only the loss matters.
        mesh: all ranks call this.
        flag: something any rank may want to tell all others, such as a request to stop; they are counted.
        reproducible: add in an order that does not depend on the number of data-parallel ranks.
    """
    summands = _in_fixed_order if reproducible else _in_any_order
    loss, squares = summands(losses, buckets, mesh)
    zero = torch.zeros((), device=mesh.device)
    counts = loss is not None and mesh.tensor.index == 0      # tensor peers computed the same loss
    totals = torch.stack((loss.float() if loss is not None and counts else zero, squares, zero + float(flag)))
    if reproducible:
        all_reduce(totals[:2], mesh.tensor)
        all_reduce(totals[:2], mesh.pipeline)
        all_reduce(totals[2:], mesh.world)
    else:
        all_reduce(totals, mesh.world)
    return StepSums(totals[0], totals[1].sqrt(), totals[2])


def _in_any_order(losses: Tensor | None, buckets: Sequence[Bucket], mesh: Mesh) -> tuple[Tensor | None, Tensor]:
    """This rank's share of the loss and of the squared gradient norm: all ranks' shares are to be added."""
    counted = [bucket.grad_shard for bucket in buckets if bucket.kind.counted and bucket.is_first_copy]
    norms = [torch.linalg.vector_norm(grad) for grad in counted]
    squares = torch.stack(norms).square().sum() if norms else torch.zeros((), device=mesh.device)
    return None if losses is None else losses.sum(), squares


def _in_fixed_order(losses: Tensor | None, buckets: Sequence[Bucket], mesh: Mesh) -> tuple[Tensor | None, Tensor]:
    """Loss and squared norm of this tensor and pipeline position, summed up over the gradient axis already.

    Every rank of that axis collects the same numbers in the same order: microbatch losses as the global batch has them,
    and sums of squares of `ALIGNMENT` elements each, which no shard boundary divides.
    """
    axis, squares = mesh.gradient, torch.zeros((), device=mesh.device)
    for bucket in buckets:
        if bucket.kind.counted:
            blocks = bucket.grad_shard.view(-1, ALIGNMENT).square().sum(1)
            everyone = all_gather(blocks, mesh.shard) if bucket.level else blocks
            squares = squares + everyone[: bucket.num_used // ALIGNMENT].sum()
    if losses is None:
        return None, squares
    return all_gather(losses, axis).view(axis.size, -1).T.flatten().sum(), squares


def clip_divisor(grad_norm: Tensor, max_norm: float) -> Tensor:
    """What gradients are divided by so that their norm is at most `max_norm` (0: no limit)."""
    if max_norm == 0:
        return torch.ones_like(grad_norm)
    return (grad_norm / max_norm).clamp(min=1.0)
