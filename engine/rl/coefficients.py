"""Numbers that a run carries from step to step, besides its models: the price of divergence, the scale of scores.

*The coefficient* of the divergence follows it: too much of it makes it dearer, by at most a fifth in `horizon` texts
(Ziegler et al. 2019, section 2.2):

    e = clip(KL / target − 1, −0.2, 0.2)        coefficient ← coefficient · (1 + e · n / horizon)

*Scores* may be divided by their standard deviation over all texts so far, kept as number, mean and sum of squared
distances, so that batches can be added one after the other (Chan et al. 1979).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MOST_CHANGE = 0.2


@dataclass(frozen=True)
class KLCoefficient:
    """The price of divergence; `target` None: it is fixed."""

    value: float
    target: float | None = None
    horizon: int = 10_000

    def after(self, kl: float, num_texts: int) -> KLCoefficient:
        """What it is after a step of so many texts whose divergence was `kl`; what is not finite changes nothing."""
        if self.target is None or not abs(kl) < float("inf"):
            return self
        error = min(max(kl / self.target - 1, -MOST_CHANGE), MOST_CHANGE)
        return KLCoefficient(self.value * (1 + error * num_texts / self.horizon), self.target, self.horizon)


@dataclass(frozen=True)
class RunningMoments:
    """Of all numbers so far: how many, their mean, the sum of their squared distances from it."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def with_more(self, numbers: Sequence[float]) -> RunningMoments:
        """And these."""
        if not numbers:
            return self
        n = float(len(numbers))
        mean = sum(numbers) / n
        squares = sum((number - mean) ** 2 for number in numbers)
        total, distance = self.count + n, mean - self.mean
        return RunningMoments(total, self.mean + distance * n / total,
                              self.squares + squares + distance**2 * self.count * n / total)

    @property
    def std(self) -> float:
        """The unbiased standard deviation; 1 of fewer than two numbers, or of equal ones."""
        variance = self.squares / (self.count - 1) if self.count > 1 else 0.0
        return variance**0.5 if variance > 0 else 1.0

    def state(self) -> list[float]:
        """As JSON."""
        return [self.count, self.mean, self.squares]

    @staticmethod
    def of(state: Any) -> RunningMoments:
        """From what `state` returned."""
        return RunningMoments(*map(float, state))
