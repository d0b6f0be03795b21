"""AdamW (Loshchilov and Hutter 2019) on the buckets' shards.

A bucket's shard is one flat fp32 vector, so a step is one call for all buckets with weight decay and one for those
without (`kernels/adamw.py`).  Clipping, the non-finite check and the copy in the compute dtype ride along in the same
pass; nothing is read by the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from engine.config import OptimConfig
from engine.kernels.table import Operations
from engine.optim.optimizer import Optimizer
from engine.parallel.data.buckets import Bucket


class AdamW(Optimizer):
    """See the module docstring."""

    def __init__(self, buckets: Sequence[Bucket], config: OptimConfig, operations: Operations) -> None:
        super().__init__(buckets, config, operations)
        self.exp_avg = [bucket.new_moment() for bucket in buckets]
        self.exp_avg_sq = [bucket.new_moment() for bucket in buckets]
        self.moments = {"exp_avg": dict(enumerate(self.exp_avg)), "exp_avg_sq": dict(enumerate(self.exp_avg_sq))}

    @torch.no_grad()
    def step(self, lr: float, grad_divisor: Tensor, found_inf: Tensor) -> None:
        """As `Optimizer.step`."""
        for decay, rows in self._groups():
            buckets = [self.buckets[i] for i in rows]
            self.operations.adamw(
                [bucket.master for bucket in buckets], [bucket.grad_shard for bucket in buckets],
                [self.exp_avg[i] for i in rows], [self.exp_avg_sq[i] for i in rows], [self.steps[i] for i in rows],
                lr=lr, betas=self.config.betas, eps=self.config.eps, weight_decay=decay, grad_divisor=grad_divisor,
                found_inf=found_inf, copies=[bucket.copy for bucket in buckets],
                ranges=[bucket.ranges for bucket in buckets] if buckets[0].master.dtype == torch.bfloat16 else ())
            for bucket in buckets:
                bucket.copied = bucket.copy is not None

    def _groups(self) -> Iterator[tuple[float, list[int]]]:
        """Indices of the buckets with each weight decay."""
        for decays in (True, False):
            rows = [i for i, bucket in enumerate(self.buckets) if bucket.kind.decay == decays]
            if rows:
                yield self.config.weight_decay if decays else 0.0, rows
