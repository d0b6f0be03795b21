"""The global gradient norm, and clipping by it.

Every element of the model counts once: each shard in one of its copies, and nothing for replicas (norms and copied keys
and values on tensor ranks above the first, the output layer's copy of a tied embedding).  It travels with the
objective's sums along one axis after the other: three small collectives in groups that are there anyway, where one over
all ranks of a large job would need a communicator of its own for a few numbers.  A reproducible run gathers the
summands over the data-parallel ranks first, and adds them in one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.distributed.collectives import all_gather, all_reduce
from engine.distributed.mesh import Mesh
from engine.kernels.sums import sum_of_squares
from engine.parallel.data.buckets import Bucket
from engine.parallel.data.flat import ALIGNMENT


@dataclass(frozen=True)
class StepSums:
    """Totals of a step, on every rank, on the device, fp32: the objective's sums, and two scalars."""

    sums: Tensor
    grad_norm: Tensor
    flag: Tensor


def sum_over_world(sums: Tensor | None, buckets: Sequence[Bucket], mesh: Mesh, *, num_sums: int = 1, flag: float = 0.0,
                   reproducible: bool = False) -> StepSums:
    """Adds up the objective's sums and the gradient norm over all ranks of the mesh.

    Args:
        sums: [microbatches, num_sums] of this rank's microbatches; None on ranks without the last chunk.
        buckets: with their reductions finished; none where only the sums matter.
        mesh: all ranks call this.
        num_sums: how many the objective has; ranks without the last chunk must know it too.
        flag: something any rank may want to tell all others, such as a request to stop; they are added up.
        reproducible: add in an order that does not depend on the number of data-parallel ranks.
    """
    summands = _in_fixed_order if reproducible else _in_any_order
    own, squares = summands(sums, buckets, mesh)
    totals = torch.zeros(num_sums + 2, device=mesh.device)
    if own is not None and mesh.tensor.index == 0:             # tensor peers computed the same sums
        totals[:num_sums] = own
    totals[-2] = squares
    totals[-1:].fill_(flag)
    all_reduce(totals, mesh.tensor)
    all_reduce(totals[-1:] if reproducible else totals, mesh.gradient)      # there the rest is summed up already
    all_reduce(totals, mesh.pipeline)
    return StepSums(totals[:num_sums], totals[-2].sqrt(), totals[-1])


def _in_any_order(sums: Tensor | None, buckets: Sequence[Bucket], mesh: Mesh) -> tuple[Tensor | None, Tensor]:
    """This rank's share of the sums and of the squared gradient norm: all ranks' shares are to be added."""
    counted = (bucket.counted_gradient() for bucket in buckets if bucket.kind.counted and bucket.is_first_copy)
    squares = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for grad in counted:
        squares += sum_of_squares(grad)
    return None if sums is None else sums.sum(0), squares


def _in_fixed_order(sums: Tensor | None, buckets: Sequence[Bucket], mesh: Mesh) -> tuple[Tensor | None, Tensor]:
    """Sums and squared norm of this tensor and pipeline position, summed up over the gradient axis already.

    Every rank of that axis collects the same numbers in the same order: microbatches as the global batch has them, and
    sums of squares of `ALIGNMENT` elements each, which no shard boundary divides.
    """
    axis, squares = mesh.gradient, torch.zeros((), dtype=torch.float64, device=mesh.device)
    for bucket in buckets:
        if bucket.kind.counted:
            blocks = torch.linalg.vector_norm(bucket.counted_gradient().view(-1, ALIGNMENT), dim=1).square()
            everyone = all_gather(blocks, mesh.shard) if bucket.level else blocks
            squares += everyone[: bucket.num_used // ALIGNMENT].sum(dtype=torch.float64)
    if sums is None:
        return None, squares
    everyone = all_gather(sums, axis).unflatten(0, (axis.size, -1))             # [ranks, microbatches, sums]
    return everyone.permute(2, 1, 0).flatten(1).sum(1), squares


def unusable(grad_norm: Tensor, most: float | None) -> Tensor:
    """Whether a step is to change nothing: its norm is not finite, or beyond `most` (OPT-175B's logbook)."""
    return (grad_norm.isfinite() if most is None else grad_norm <= most).logical_not()


def clip_divisor(grad_norm: Tensor, max_norm: float) -> Tensor:
    """What gradients are divided by so that their norm is at most `max_norm` (0: no limit)."""
    if max_norm == 0:
        return torch.ones_like(grad_norm)
    return (grad_norm / max_norm).clamp(min=1.0)
