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
        by_phase: the sum for each phase that occurred, within steps and besides.
        each: of every step, in order.
        steps: how many were done; `in_steps`: what they took in all.
    """

    by_phase: dict[str, float]
    each: tuple[float, ...]

    @property
    def steps(self) -> int:
        return len(self.each)

    @property
    def in_steps(self) -> float:
        return sum(self.each)


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
        begin = self.mark()
        yield
        self._steps.append((begin, self.mark()))

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """A phase; phases do not overlap.  After an exception `now` still names the one in which it happened."""
        self.now = Moment(name, self.now.step, self._clock())
        for listener in self.listeners:
            listener(self.now)
        begin = self.mark()
        with record_function(name):
            yield
        self._spans.setdefault(name, []).append((begin, self.mark()))
        self.now = Moment(BETWEEN, self.now.step, self._clock())

    def taken(self) -> Taken:
        """Where the time went since the last call; on a GPU it waits for what has been started."""
        steps, spans, self._steps, self._spans = self._steps, self._spans, [], {}
        return Taken({name: sum(seconds(*span) for span in each) for name, each in spans.items()},
                     tuple(seconds(*span) for span in steps))

    def mark(self) -> Mark:
        """A place in this rank's work; `seconds` tells what lay between two of them."""
        if not self._on_gpu:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def seconds(begin: Mark, end: Mark) -> float:
    """Between two marks; on a GPU it waits until the second has been passed."""
    if isinstance(begin, float) or isinstance(end, float):
        return float(end) - float(begin)                       # type: ignore[arg-type]
    end.synchronize()
    return begin.elapsed_time(end) / 1000
