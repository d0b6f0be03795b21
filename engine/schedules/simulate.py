"""A walk with a clock: when everything happens, how much of the time is lost, and how much is held in memory.

An action starts when its rank is free and its inputs have arrived, and takes a fixed time.  A message between ranks
takes a fixed time too, and occupies neither of them: the network carries it while both compute.

* **Costs** are those of a whole physical stage for one microbatch: with V chunks per rank each chunk's F takes
  forward / V.  B and W as one (BW) take backward + weight.
* **Makespan T** is the longest time a rank needs from the start of its first action to the end of its last.  In most
  schedules that is rank 0, which begins first and ends last.  In zb-h2 and zb-v every rank begins a little later than
  the one before it and ends later too, so steps could follow each other without a gap, like leaning bricks, if
  nothing made the ranks meet in between.  The optimizer step does (the gradient norm is global), so a training step
  takes `elapsed`, from the first start to the last end.  T is what the literature compares and computes bubble rates
  from.
* **Bubble rate** is (T - M(F+B+W)) / T: the part of T in which even the busiest rank has nothing to do.
* **Activations in flight** are counted in chunks: a (chunk, microbatch) is held from the start of its F to the end of
  its W (or BW), since the weight gradient is made from it.  With V chunks per rank each is 1/V of a stage's
  activation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from math import inf

from engine.errors import RequestError
from engine.schedules.action import Action, Kind
from engine.schedules.program import Schedule, inputs, walk
from engine.schedules.validate import validate


@dataclass(frozen=True)
class Costs:
    """Times of one microbatch on a whole physical stage, and of one message between ranks; any one unit.

    Raises:
        RequestError: a cost that is negative or not finite, or no work at all.
    """

    forward: float = 1
    backward: float = 1
    weight: float = 1
    communication: float = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0 <= getattr(self, field.name) < inf:
                raise RequestError(f"cost of {field.name} = {getattr(self, field.name)}: give a time of zero or more")
        if not self.work > 0:
            raise RequestError("forward, backward and weight all cost nothing: give at least one of them a time")

    @property
    def work(self) -> float:
        """F + B + W."""
        return self.forward + self.backward + self.weight

    def of(self, kind: Kind) -> float:
        """Time a compute action takes on a whole stage."""
        return {Kind.F: self.forward, Kind.B: self.backward, Kind.W: self.weight,
                Kind.BW: self.backward + self.weight}[kind]


@dataclass(frozen=True)
class Event:
    """An action that occupies its rank from `start` to `end`."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What happened when; `events` has one tuple per rank, in order."""

    schedule: Schedule
    costs: Costs
    events: tuple[tuple[Event, ...], ...]

    @property
    def elapsed(self) -> float:
        """From the start of the first action to the end of the last, over all ranks."""
        return max(events[-1].end for events in self.events)

    @property
    def makespan(self) -> float:
        """T: the longest time from the start of a rank's first action to the end of its last."""
        return max(events[-1].end - events[0].start for events in self.events)

    @property
    def bubble_time(self) -> float:
        """T - M(F+B+W), free of rounding where that is nothing."""
        lost = self.makespan - self.schedule.num_microbatches * self.costs.work
        return lost if lost > 1e-12 * self.makespan else 0.0

    @property
    def bubble(self) -> float:
        """Bubble rate, (T - M(F+B+W)) / T."""
        return self.bubble_time / self.makespan

    @property
    def peak_in_flight(self) -> tuple[int, ...]:
        """For each rank, the largest number of (chunk, microbatch) activations held at once."""
        return tuple(_peak(events) for events in self.events)


def simulate(schedule: Schedule, costs: Costs, takes: Callable[[Action], float] | None = None) -> Timeline:
    """Runs the computations of a schedule, lowered or not, with a clock.

    Args:
        takes: the time of a computation, where chunks differ; `costs` is then asked for that of messages only.

    Raises:
        ConfigError: the schedule does not get to its end.
    """
    schedule = replace(schedule, programs=tuple(tuple(action for action in program if action.kind.is_compute)
                                                for program in schedule.programs))
    takes = takes or (lambda action: costs.of(action.kind) / schedule.num_chunks)
    free: list[float] = [0] * schedule.num_stages            # when each rank has finished what it was doing
    ended: dict[Action, float] = {}
    events: list[list[Event]] = [[] for _ in range(schedule.num_stages)]
    for rank, action in walk(schedule):
        ready = (ended[part] + (0 if schedule.placement[part.chunk] == rank else costs.communication)
                 for part in inputs(schedule, action))
        start = max([free[rank], *ready])
        free[rank] = start + takes(action)
        ended.update(dict.fromkeys(action.parts, free[rank]))
        events[rank].append(Event(action, start, free[rank]))
    if any(len(done) < len(program) for done, program in zip(events, schedule.programs, strict=True)):
        validate(schedule)                                   # says which ranks wait for what
    return Timeline(schedule, costs, tuple(map(tuple, events)))


def _peak(events: Sequence[Event]) -> int:
    held = peak = 0
    for event in events:
        held += event.action.kind is Kind.F
        peak = max(peak, held)
        held -= event.action.kind.makes_weight_gradient
    return peak
