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
from engine.parallel.data.buckets import Bucket


class AdamW:
    """Moments of every bucket's shard, and the update."""

    def __init__(self, buckets: Sequence[Bucket], config: OptimConfig, operations: Operations) -> None:
        self.buckets, self.config, self._update = buckets, config, operations.adamw
        self.exp_avg = [torch.zeros_like(bucket.master) for bucket in buckets]
        self.exp_avg_sq = [torch.zeros_like(bucket.master) for bucket in buckets]
        self.steps = [torch.zeros((), dtype=torch.float32, device=bucket.master.device) for bucket in buckets]

    @torch.no_grad()
    def step(self, lr: float, grad_divisor: Tensor, found_inf: Tensor) -> None:
        """Updates masters from the gradient shards.

        Args:
            lr: learning rate of this step.
            grad_divisor: fp32 scalar; gradients are divided by it.
            found_inf: fp32 scalar; 1 makes this step change nothing.
        """
        for decay, rows in self._groups():
            self._update([self.buckets[i].master for i in rows], [self.buckets[i].grad_shard for i in rows],
                         [self.exp_avg[i] for i in rows], [self.exp_avg_sq[i] for i in rows],
                         [self.steps[i] for i in rows], lr=lr, betas=self.config.betas, eps=self.config.eps,
                         weight_decay=decay, grad_divisor=grad_divisor, found_inf=found_inf)

    def num_steps(self) -> int:
        """Updates made so far; skipped ones do not count."""
        return int(self.steps[0].item()) if self.steps else 0

    def set_num_steps(self, num_steps: int) -> None:
        """Takes over the count of a checkpoint."""
        for step in self.steps:
            step.fill_(num_steps)

    def _groups(self) -> Iterator[tuple[float, list[int]]]:
        """Indices of the buckets with each weight decay."""
        for decays in (True, False):
            rows = [i for i, bucket in enumerate(self.buckets) if bucket.kind.decay == decays]
            if rows:
                yield self.config.weight_decay if decays else 0.0, rows
