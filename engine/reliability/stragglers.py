"""Who is slow: a rank's own time for a step, with its waiting for others left out.

All ranks take equally long, because the fast ones wait.  A rank's own time is what is left of a step without these
waits (`engine.distributed.waits`).  Whoever needs `reliability.straggler_factor` times as long as the rank in the
middle, in so many lines of the log in a row, is named there and in `events.jsonl`; once, until it has been as fast as
the others again.  The first line of a process, with all that is done once, does not count.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

from engine.distributed.agree import Group, gather_json, gather_numbers, size_of

LEAST_SECONDS = 0.05                       # behind the middle: less is noise
IN_A_ROW = 3                               # lines


@dataclass(frozen=True)
class Pace:
    """Of the steps since the last line.

    Attributes:
        own: each rank's own seconds for a step.
        waiting: seconds of a step in which a rank waited, the mean over ranks.
        newly: ranks that have become slow.
    """

    own: Sequence[float]
    waiting: float
    newly: Sequence[int] = ()

    def record(self) -> dict[str, float]:
        """For `metrics.jsonl`."""
        slowest = max(range(len(self.own)), key=lambda rank: self.own[rank])
        return {"own_seconds": median_low(self.own), "slowest_seconds": self.own[slowest], "slowest_rank": slowest,
                "waiting_seconds": self.waiting}


class Stragglers:
    """Compares the ranks of a job.

    Args:
        factor: times the middle's own time from which a rank is slow; None: nobody is.
    """

    def __init__(self, factor: float | None, group: Group) -> None:
        self._factor, self._group = factor, group
        self._hosts: list[str] = []
        self._in_a_row: Counter[int] | None = None

    def compare(self, step_seconds: float, waited_seconds: float) -> Pace:
        """Every rank must call this, with the means of its steps since the last call."""
        if size_of(self._group) == 1:
            return Pace([step_seconds], 0.0)
        everyone = gather_numbers([step_seconds - waited_seconds, waited_seconds], self._group)
        own = [mine for mine, _ in everyone]
        before, slow = self._in_a_row, slow_ranks(own, self._factor)
        self._in_a_row = Counter() if before is None else Counter({rank: before[rank] + 1 for rank in slow})
        newly = sorted(rank for rank, count in self._in_a_row.items() if count == IN_A_ROW)
        return Pace(own, sum(waited for _, waited in everyone) / len(everyone), newly)

    def words(self, pace: Pace) -> str:
        """What there is to say of those that have become slow; every rank must call this where there are some."""
        self._hosts = self._hosts or gather_json(socket.gethostname(), self._group)
        named = ", ".join(f"rank {rank} on {self._hosts[rank]} ({pace.own[rank]:.3g} s)" for rank in pace.newly[:8])
        more = f" and {len(pace.newly) - 8} more" if len(pace.newly) > 8 else ""
        return f"slow: {named}{more}; of its own a step takes the rank in the middle {median_low(pace.own):.3g} s"


def slow_ranks(own: Sequence[float], factor: float | None) -> set[int]:
    """Those whose own time stands out; of two ranks the faster one is the middle."""
    if factor is None:
        return set()
    middle = median_low(own)
    return {rank for rank, seconds in enumerate(own) if seconds > max(factor * middle, middle + LEAST_SECONDS)}
