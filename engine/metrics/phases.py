"""What this rank is doing now, and how long each part of a step takes.

    with phases.step(7):
        with phases("load"): …
        with phases("forward_backward"): …
    with phases("save"): …

Whoever wants to know hangs here, and the loop does not know of them: `now` may be read at any time by another thread (a
watchdog), `listeners` are told of every phase as it begins (a profiler, a fault to inject), the profiler's trace shows
each phase under its name, and `taken` says where the time went since it was last asked.

*Time.*  A GPU works behind the program's back, so a clock read by the host would charge the work to whoever happens to
wait for it.  There the marks are events in the stream of work: the time between two of them is what the device spent,
idle or busy, between the same two places of the program, and reading them makes nobody wait before `taken` does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import record_function

BETWEEN = "between"                        # in no phase


@dataclass(frozen=True)
class Moment:
    """A phase that has begun.

    Attributes:
        step: the step it belongs to, counted from 1; what is done after a step belongs to that step, 0 is the start.
        since: when it began, in seconds of a monotonic clock.
    """

    phase: str
    step: int
    since: float


@dataclass(frozen=True)
class Taken:
    """Seconds since the last time anybody asked.

    Attributes:
        steps: how many were done.
        in_steps: what they took in all.
        by_phase: the sum for each phase that occurred, within steps and besides.
    """

    steps: int
    in_steps: float
    by_phase: dict[str, float]


Mark = float | torch.cuda.Event
Listener = Callable[[Moment], None]


class Phases:
    """The phases of one rank's run."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._on_gpu = clock, device.type == "cuda"
        self.now = Moment("start", 0, clock())
        self.listeners: list[Listener] = []
        self._steps: list[tuple[Mark, Mark]] = []
        self._spans: dict[str, list[tuple[Mark, Mark]]] = {}

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Step `number`, from loading its samples to having heard what became of it."""
        self.now = Moment(BETWEEN, number, self._clock())
        begin = self._mark()
        yield
        self._steps.append((begin, self._mark()))

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """A phase; phases do not overlap.  After an exception `now` still names the one in which it happened."""
        self.now = Moment(name, self.now.step, self._clock())
        for listener in self.listeners:
            listener(self.now)
        begin = self._mark()
        with record_function(name):
            yield
        self._spans.setdefault(name, []).append((begin, self._mark()))
        self.now = Moment(BETWEEN, self.now.step, self._clock())

    def taken(self) -> Taken:
        """Where the time went since the last call; on a GPU it waits for what has been started."""
        steps, spans, self._steps, self._spans = self._steps, self._spans, [], {}
        return Taken(len(steps), sum(_seconds(*span) for span in steps),
                     {name: sum(_seconds(*span) for span in each) for name, each in spans.items()})

    def _mark(self) -> Mark:
        if not self._on_gpu:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(begin: Mark, end: Mark) -> float:
    if isinstance(begin, float) or isinstance(end, float):
        return float(end) - float(begin)                       # type: ignore[arg-type]
    end.synchronize()
    return begin.elapsed_time(end) / 1000
