"""What a schedule is — a value — and what it means — a walk.

A `Schedule` holds one program per rank: the list of its actions, in order.  It says nothing about time; a rank simply
takes its next action as soon as its inputs are there.

`walk` is that meaning, in one place.  It runs all programs against each other and yields the actions in an order that
respects every dependency.  In a lowered schedule (one with SEND and RECV) what comes from another rank is there only
after it was received, and a SEND waits until the other rank has reached the RECV, and the reverse: blocking
rendezvous, the strictest behaviour a network can have.  A walk that ends early is a deadlock.  Validation is a walk
with a message, and simulation is a walk with a clock.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import cached_property

from engine.schedules.action import Action, Kind

Program = tuple[Action, ...]


@dataclass(frozen=True)
class Schedule:
    """What every rank does, in order.

    Attributes:
        name: gpipe, 1f1b, …
        num_stages: physical stages (ranks of the pipeline), P.
        num_microbatches: M.
        num_chunks: chunks of the model on each rank, V.
        placement: chunk (0 … P·V-1, in model order) → rank.
        programs: one per rank.
    """

    name: str
    num_stages: int
    num_microbatches: int
    num_chunks: int
    placement: tuple[int, ...]
    programs: tuple[Program, ...]

    @cached_property
    def is_lowered(self) -> bool:
        """Whether the programs contain the messages between ranks."""
        return any(action.kind.is_communication for program in self.programs for action in program)

    def crosses(self, chunk: int) -> bool:
        """Whether there is a chunk before `chunk` and it lives on another rank."""
        return 0 < chunk < len(self.placement) and self.placement[chunk - 1] != self.placement[chunk]


def inputs(schedule: Schedule, action: Action) -> Iterator[Action]:
    """What has to be done before `action`: F, B and W, and the RECV of what comes from another rank once lowered."""
    kind, m, chunk = action.kind, action.microbatch, action.chunk
    if kind in (Kind.B, Kind.BW, Kind.SEND_F):
        yield Action(Kind.F, m, chunk)
    if kind in (Kind.W, Kind.SEND_B):
        yield Action(Kind.B, m, chunk)
    if kind is Kind.F and chunk > 0:
        received = schedule.is_lowered and schedule.crosses(chunk)
        yield Action(Kind.RECV_F, m, chunk) if received else Action(Kind.F, m, chunk - 1)
    if kind in (Kind.B, Kind.BW) and chunk + 1 < len(schedule.placement):
        received = schedule.is_lowered and schedule.crosses(chunk + 1)
        yield Action(Kind.RECV_B, m, chunk) if received else Action(Kind.B, m, chunk + 1)
    if kind is Kind.REDUCE_GRAD:
        yield from (Action(Kind.W, i, chunk) for i in range(schedule.num_microbatches))


def missing_input(schedule: Schedule, action: Action, done: Container[Action],
                  waiting: Container[Action]) -> Action | None:
    """What `action` still has to wait for, if anything.

    A message needs its other end to be `done`, or to have arrived there too: then somebody is `waiting` for `action`.
    """
    for part in inputs(schedule, action):
        if part not in done:
            return part
    if action.kind.is_communication and action.partner not in done and action not in waiting:
        return action.partner
    return None


def walk(schedule: Schedule) -> Iterator[tuple[int, Action]]:
    """Runs the programs against each other and yields (rank, action) in an order that respects every dependency.

    The two ends of a message come in either order.  Ends early where no rank can go on.
    """
    programs, position = schedule.programs, [0] * schedule.num_stages
    done: set[Action] = set()
    waiting: dict[Action, list[int]] = {}                    # what is missing → the ranks that wait for it
    ready = list(reversed(range(schedule.num_stages)))
    while ready:
        rank = ready.pop()
        while position[rank] < len(programs[rank]):
            action = programs[rank][position[rank]]
            missing = missing_input(schedule, action, done, waiting)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            yield rank, action
            position[rank] += 1
            for part in action.parts:
                done.add(part)
                ready += waiting.pop(part, [])
