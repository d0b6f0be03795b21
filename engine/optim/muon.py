"""Muon (Jordan et al. 2024) on the matrices of the layers, AdamW on all else.

    m = μ·m + (1 − μ)·g          u = orthogonal(μ·m + (1 − μ)·g)          w = (1 − lr·λ)·w − lr·0.2·√max(n, m)·u

`orthogonal` takes a matrix U·S·Vᵀ near U·Vᵀ, by five steps of a Newton–Schulz iteration that needs products only.  The
factor gives updates the size of AdamW's, so that both go by one learning rate (Liu et al. 2025, section 2.2).  One
moment per weight where AdamW has two.

An update needs its whole matrix: shards are gathered (ZeRO), then the slices of the tensor ranks.  A rank does that for
the matrices that its own shard has part of and leaves the others to those who have the rest.  What the engine stores as
one tensor is several matrices where a model has several: q, k and v, gate and up (`engine.model.projections`).
Products run in the dtype of the layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.config import OptimConfig
from engine.distributed.collectives import all_gather, all_gather_into
from engine.kernels.table import Operations
from engine.model.parameters import put_together, take_local
from engine.model.projections import FUSED
from engine.optim.adamw import AdamW
from engine.optim.optimizer import Optimizer
from engine.parallel.data.buckets import Bucket
from engine.parallel.data.flat import Entry

MOMENTUM = 0.95
NUM_STEPS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)       # of Jordan et al.: steepest at zero
SIZE_OF_ADAMW = 0.2                                          # root mean square of AdamW's updates, Liu et al.


class Muon(Optimizer):
    """See the module docstring."""

    def __init__(self, buckets: Sequence[Bucket], config: OptimConfig, operations: Operations) -> None:
        super().__init__(buckets, config, operations)
        self._matrices = [i for i, bucket in enumerate(buckets) if bucket.kind.matrices]
        others = [i for i in range(len(buckets)) if i not in self._matrices]
        self._rest = AdamW([buckets[i] for i in others], config, operations)
        for place, i in enumerate(others):
            self._rest.steps[place] = self.steps[i]
        self.moments = {"momentum": {i: buckets[i].new_moment() for i in self._matrices},
                        **{name: {others[place]: moment for place, moment in of_bucket.items()}
                           for name, of_bucket in self._rest.moments.items()}}

    @torch.no_grad()
    def step(self, lr: float, grad_divisor: Tensor, found_inf: Tensor) -> None:
        """As `Optimizer.step`."""
        self._rest.step(lr, grad_divisor, found_inf)
        momentum, skipped = self.config.momentum_or(MOMENTUM), found_inf.bool()
        for i in self._matrices:
            bucket, kept = self.buckets[i], self.moments["momentum"][i]
            gradient = bucket.grad_shard / grad_divisor
            averaged = torch.lerp(kept, gradient, 1 - momentum)
            update = orthogonal_shard(bucket, gradient.lerp_(averaged, momentum))
            kept.copy_(torch.where(skipped, kept, averaged))
            changed = bucket.wide_master() * (1 - lr * self.decay_of(bucket)) - lr * update
            bucket.write(changed, skipped, self.steps[i])
            self.steps[i].add_(1 - found_inf)


def orthogonal_shard(bucket: Bucket, shard: Tensor) -> Tensor:
    """This rank's part of the updates of a bucket's matrices, of its part of what they are made of.

    Every rank that shares the bucket must call this.
    """
    whole = shard
    if bucket.level and bucket.mesh.shard.size > 1:
        whole = shard.new_empty(bucket.param_buffer.numel())
        all_gather_into(whole, shard, bucket.mesh.shard).wait()
    out = torch.zeros_like(shard)
    for entry in bucket.entries:
        start, stop = bucket.overlap(entry)
        if start < stop:
            local = whole[entry.offset : entry.offset + entry.parameter.numel()].view(entry.spec.local_shape)
            update = _of_parameter(bucket, entry, local).flatten()
            out[start - bucket.shard.start : stop - bucket.shard.start] = \
                update[start - entry.offset : stop - entry.offset]
    return out


def _of_parameter(bucket: Bucket, entry: Entry, local: Tensor) -> Tensor:
    """This tensor rank's slice of a parameter's update; its tensor peers call it with theirs."""
    spec = entry.spec
    if spec.cut is None:
        return orthogonal_parts(spec.name, local, bucket.param_buffer.dtype)
    whole = put_together(spec, all_gather(local.unsqueeze(0), bucket.mesh.tensor))
    return take_local(spec, orthogonal_parts(spec.name, whole, bucket.param_buffer.dtype))


def orthogonal_parts(name: str, parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """The update of a whole parameter, of each of the matrices that it holds."""
    fused, out = FUSED[name.removesuffix(".weight").rpartition(".")[2]], torch.empty_like(parameter)
    for _, first, length in fused.rows(parameter.shape[fused.dim]):
        part = parameter.narrow(fused.dim, first, length)
        matrix = part.reshape(-1, part.shape[-1])
        update = orthogonal(matrix, dtype) * (SIZE_OF_ADAMW * max(matrix.shape) ** 0.5)
        out.narrow(fused.dim, first, length).copy_(update.view(part.shape))
    return out


def orthogonal(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, m] → nearly U·Vᵀ of its singular value decomposition, fp32; the products run in `dtype`."""
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype)
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(NUM_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).float()
