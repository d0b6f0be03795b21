"""Stochastic gradient descent with momentum (Sutskever et al. 2013), as `torch.optim.SGD` has it.

    m = μ·m + (g + λ·w)          w = w − lr·m

One moment per weight where AdamW has two.  The decay λ is part of the gradient, so it goes through the momentum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.config import OptimConfig
from engine.kernels.table import Operations
from engine.optim.optimizer import Optimizer
from engine.parallel.data.buckets import Bucket

MOMENTUM = 0.9


class SGD(Optimizer):
    """See the module docstring."""

    def __init__(self, buckets: Sequence[Bucket], config: OptimConfig, operations: Operations) -> None:
        super().__init__(buckets, config, operations)
        self.moments = {"momentum": {i: bucket.new_moment() for i, bucket in enumerate(buckets)}}

    @torch.no_grad()
    def step(self, lr: float, grad_divisor: Tensor, found_inf: Tensor) -> None:
        """As `Optimizer.step`."""
        momentum, skipped = self.config.momentum_or(MOMENTUM), found_inf.bool()
        for i, bucket in enumerate(self.buckets):
            kept = self.moments["momentum"][i]
            weights = bucket.wide_master()
            update = (bucket.grad_shard / grad_divisor).add_(weights, alpha=self.decay_of(bucket))
            update.add_(kept, alpha=momentum)
            kept.copy_(torch.where(skipped, kept, update))
            bucket.write(weights - lr * update, skipped, self.steps[i])
            self.steps[i].add_(1 - found_inf)
