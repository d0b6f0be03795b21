"""Learning rate by step: linear warm-up, then cosine, linear or constant.

With w warm-up steps of n in all, step t (the first is 1) has

    t ≤ w   lr · t / w
    t > w   min_lr + (lr − min_lr) · f(x),   x = min(1, (t − w) / (n − w)),   f = (1 + cos πx)/2  |  1 − x  |  1

so it is a function of the step alone: nothing to save, and a resumed run follows the same curve.
"""

from __future__ import annotations

import math

from engine.config import OptimConfig


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """Learning rate of `step` (counted from 1) in a run of `num_steps`."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))
    share = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}[config.decay]
    return config.min_lr + (config.lr - config.min_lr) * share
