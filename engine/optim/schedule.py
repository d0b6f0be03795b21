"""Learning rate by step: linear warm-up, then the shape that `optim.decay` names (`engine.config.decay`)."""

from __future__ import annotations

from engine.config import Config, OptimConfig


def learning_rate(step: float, num_steps: float, config: OptimConfig) -> float:
    """Learning rate of `step` (counted from 1) in a run of `num_steps`."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    return config.decay.rate(step, num_steps, config)


def rate_of(config: Config, step: int, samples: int) -> float:
    """Learning rate of step `step`, counted from 1, with which `samples` samples are consumed.

    Where the batch grows it follows the samples: a step counts for as much as its part of a batch of the final size.
    """
    position = samples / config.batch.global_ if config.batch.ramp else step
    return learning_rate(position, config.num_batches, config.rates)
