"""AdamW (Loshchilov and Hutter 2019) on the buckets' shards.

A bucket's shard is one flat fp32 vector, so a step is one call for all buckets with weight decay and one for those
without (`kernels/adamw.py`).  Clipping and the non-finite check ride along in the same pass; neither is read by the
host.
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
        self.exp_avg = [torch.zeros_like(bucket.master) for bucket in buckets]
        self.exp_avg_sq = [torch.zeros_like(bucket.master) for bucket in buckets]
        self.moments = {"exp_avg": dict(enumerate(self.exp_avg)), "exp_avg_sq": dict(enumerate(self.exp_avg_sq))}

    @torch.no_grad()
    def step(self, lr: float, grad_divisor: Tensor, found_inf: Tensor) -> None:
        """As `Optimizer.step`."""
        for decay, rows in self._groups():
            self.operations.adamw(
                [self.buckets[i].master for i in rows], [self.buckets[i].grad_shard for i in rows],
                [self.exp_avg[i] for i in rows], [self.exp_avg_sq[i] for i in rows], [self.steps[i] for i in rows],
                lr=lr, betas=self.config.betas, eps=self.config.eps, weight_decay=decay, grad_divisor=grad_divisor,
                found_inf=found_inf)

    def _groups(self) -> Iterator[tuple[float, list[int]]]:
        """Indices of the buckets with each weight decay."""
        for decays in (True, False):
            rows = [i for i, bucket in enumerate(self.buckets) if bucket.kind.decay == decays]
            if rows:
                yield self.config.weight_decay if decays else 0.0, rows
