"""Learning rate by step: linear warm-up, then the shape that `optim.decay` names (`engine.config.decay`)."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import Config, OptimConfig


def learning_rate(step: float, num_steps: float, config: OptimConfig) -> float:
    """Learning rate of `step` (counted from 1) in a run of `num_steps`."""
    factor = 1.0 if config.square_root is None else config.square_root.factor
    if step <= config.warmup_steps:
        return factor * config.lr * step / config.warmup_steps
    return factor * config.decay.rate(step, num_steps, config)


@dataclass(frozen=True)
class LearningRates:
    """The learning rates of a run.

    Where the batch grows they follow the samples: a step counts for as much as its part of a batch of the final size.

    Attributes:
        num_batches: the run's length in batches of the final size.
        batch: that size, if the batch grows; 0: all are alike.
    """

    optim: OptimConfig
    num_batches: float
    batch: int

    @staticmethod
    def of(config: Config) -> LearningRates:
        """Those of the run that is configured."""
        return LearningRates(config.rates, config.num_batches, config.batch.global_ if config.batch.ramp else 0)

    def __call__(self, step: int, samples: int) -> float:
        """That of step `step`, counted from 1, with which `samples` samples are consumed."""
        return learning_rate(samples / self.batch if self.batch else step, self.num_batches, self.optim)
