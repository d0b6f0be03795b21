"""What share of a job's time trains when machines fail, and how often it is best to save.

Failures come at random, one in a mean time M, the sooner the more devices there are.  Between two saves lie τ seconds
of training, then δ that training waits for the save; a failure loses what was done since the last save, and R seconds
pass until training goes on, in which the next failure may come.  A segment of τ and its save then take (Daly 2006)

    M e^(R/M) (e^((τ+δ)/M) − 1)

in the mean, of which τ was worth it.  The best τ is about √(2δM) (Young 1974); `best_interval` is the exact optimum.  A
save that is written in the background counts only when it has been, w seconds later: a failure then loses w more, as if
the restart took so much longer (in the first order: as long as w < τ and few failures come in one interval).

J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17(9), 1974.  J. T. Daly, A higher
order estimate of the optimum checkpoint interval for restart dumps, FGCS 22(3), 2006.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DAY_SECONDS = 86_400.0


@dataclass(frozen=True)
class Failures:
    """What a job of `gpus` devices met with in so many days."""

    count: float
    days: float
    gpus: int

    def mean_seconds(self, gpus: int) -> float:
        """Between two failures of a job of another size: every device fails as often."""
        return self.days * DAY_SECONDS / self.count * self.gpus / gpus


LLAMA_3 = Failures(419, 54, 16_384)        # Llama 3 405B: unexpected interruptions, arXiv:2407.21783, section 3.3.4


@dataclass(frozen=True)
class Times:
    """In seconds.

    Attributes:
        failure: the mean between two of them.
        restart: from a failure to training again.
        save: that training waits for a save.
        write: from there until the save counts, while training goes on.
    """

    failure: float
    restart: float
    save: float
    write: float = 0.0


@dataclass(frozen=True)
class Shares:
    """What a job's time goes into; they sum to one."""

    training: float
    saving: float
    restarting: float
    lost: float


def shares(times: Times, interval: float) -> Shares:
    """With a save after every `interval` seconds of training."""
    mean = times.failure
    segment = mean * math.exp((times.restart + times.write) / mean) * math.expm1((interval + times.save) / mean)
    training, saving = interval / segment, times.save / segment
    restarting = -math.expm1(-times.restart / mean)          # 1/M failures a second, each min(R, time to the next) long
    return Shares(training, saving, restarting, 1 - training - saving - restarting)


def best_interval(times: Times) -> float:
    """Seconds of training between saves at which most time trains.

    The derivative of `shares(…).training` is zero where (1 − τ/M) e^((τ+δ)/M) = 1; its left side falls from e^(δ/M) at
    0 to 0 at M.
    """
    low, high = 0.0, times.failure
    while high - low > 1e-9 * times.failure:
        middle = (low + high) / 2
        if (1 - middle / times.failure) * math.exp((middle + times.save) / times.failure) > 1:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def young(times: Times) -> float:
    """Young's interval, the first order of the best one."""
    return math.sqrt(2 * times.save * times.failure)
