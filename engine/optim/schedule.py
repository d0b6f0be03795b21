"""Learning rate by step: linear warm-up, then the shape that `optim.decay` names (`engine.config.decay`)."""

from __future__ import annotations

from engine.config import OptimConfig


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """Learning rate of `step` (counted from 1) in a run of `num_steps`."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    return config.decay.rate(step, num_steps, config)
