"""How long this rank waits for others.

All ranks of a job take equally long for a step: the fast ones wait for the slow.  What tells them apart is the time in
which they do not wait, so every wait for a peer adds to a count: the host's time on a CPU, where it stands still in the
collective; on a GPU the time in which its stream stands still, between two events around the wait.

On a GPU the tensor and context axes are left out.  Their collectives, thousands a step, lie within a node, and their
ranks keep step to within one layer, so that a slow one shows as a slow group.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")
NOT_ON_A_GPU = ("tensor", "context")       # axes


class Waits:
    """Counts while it is `on`."""

    def __init__(self, device: torch.device) -> None:
        self.on = False
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def during(self, call: Callable[[], T]) -> T:
        """Calls what waits."""
        if not self.on:
            return call()
        if self._on_gpu:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            result = call()
            end.record()
            self._events.append((begin, end))
            return result
        since = time.perf_counter()
        result = call()
        self._seconds += time.perf_counter() - since
        return result

    def taken(self) -> float:
        """Seconds since the last call; on a GPU it waits for what has been started."""
        seconds, events, self._seconds, self._events = self._seconds, self._events, 0.0, []
        if events:
            events[-1][1].synchronize()
        return seconds + sum(begin.elapsed_time(end) for begin, end in events) / 1000


class Timed:
    """The handle of a collective, whose `wait` is counted."""

    def __init__(self, work: Any, waits: Waits) -> None:
        self._work, self._waits = work, waits

    def wait(self) -> object:
        """Waits for the collective."""
        return self._waits.during(self._work.wait)

    def is_completed(self) -> bool:
        """Whether there is nothing to wait for any more."""
        return bool(self._work.is_completed())
