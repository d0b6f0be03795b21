"""Lowering: add to a schedule's computations the messages between ranks, in an order that cannot deadlock.

The obvious way — receive right before use, send right after — deadlocks: in 1F1B a rank that wants to send an output
down meets its neighbour, which wants to send a gradient up, and each waits for the other to receive.  So all programs
are read off *one* global order:

1. Simulate the schedule.  Sort everything that happens by time: a computation by its start, a message by the moment
   its producer ends.
2. In this list a message is the pair SEND, RECV, one directly behind the other.
3. Each rank's program is its part of the list, in the list's order (a projection).

**Why it cannot deadlock**, even if every SEND blocks until its RECV is reached and the reverse: look at the first
element of the list that has not happened.  All before it has happened, so its inputs are there (a producer comes
before its consumers), and the rank, or the two ranks of a message, have nothing else to do first.  So it happens; and
so on to the end.

**Why it is fast.**  A tensor leaves as soon as it exists, and its RECV stands at the receiver's first pause after
that rather than right before its use: the message travels while the receiver computes.  An executor that starts both
without blocking, waits only where the tensor is used, and starts a RECV before the computation it directly follows
(which keeps the order among messages, hence the argument above) takes the simulated time; with many chunks per rank up
to 3 % more.  The simulation behind the order gives messages a little time for this reason: without it, SEND and use
would fall on the same moment all over the pipeline.

Chunks that are neighbours on the same rank (the turn of zb-v, a pipeline of one stage) hand their tensors over
directly. REDUCE_GRAD stands behind the last action that adds to a chunk's gradients, and behind the SEND of that
action's result, which a rank upstream is waiting for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from engine.schedules.action import Action, Kind
from engine.schedules.program import Schedule
from engine.schedules.simulate import Costs, Event, simulate

ORDERING_COSTS = Costs(forward=1, backward=1, weight=1, communication=0.05)
Moment = tuple[float, int, int, int]                         # time, what comes first at that time, and two tie-breakers
Element = tuple[Moment, int, Action]                         # when, which rank, what


def lower(schedule: Schedule) -> Schedule:
    """The same schedule with SEND, RECV and REDUCE_GRAD; every rank computes the same."""
    timeline = simulate(schedule, ORDERING_COSTS)
    order: list[Element] = []
    for rank, events in enumerate(timeline.events):
        last_gradient = {event.action.chunk: event for event in events if event.action.kind.makes_weight_gradient}
        for event in events:
            order.append(((event.start, 2, rank, 0), rank, event.action))
            order += _message(schedule, rank, event)
        order += [((event.end, 1, rank, 0), rank, Action(Kind.REDUCE_GRAD, 0, chunk))
                  for chunk, event in last_gradient.items()]
    programs: list[list[Action]] = [[] for _ in range(schedule.num_stages)]
    for _, rank, action in sorted(order, key=_moment):
        programs[rank].append(action)
    return replace(schedule, programs=tuple(map(tuple, programs)))


def hoist_receives(program: Sequence[Action]) -> tuple[Action, ...]:
    """Moves every RECV in front of the computation before it; the order among messages stays."""
    out: list[Action] = []
    for action in program:
        at = len(out)
        if action.kind in (Kind.RECV_F, Kind.RECV_B) and at and out[at - 1].kind.is_compute:
            at -= 1
        out.insert(at, action)
    return tuple(out)


def _message(schedule: Schedule, rank: int, event: Event) -> Iterator[Element]:
    """The SEND of an event's result and the RECV at the other end, where that is another rank."""
    action = event.action
    if action.kind is Kind.F and schedule.crosses(action.chunk + 1):
        send = Action(Kind.SEND_F, action.microbatch, action.chunk)
    elif action.kind in (Kind.B, Kind.BW) and schedule.crosses(action.chunk):
        send = Action(Kind.SEND_B, action.microbatch, action.chunk)
    else:
        return
    other = schedule.placement[send.partner.chunk]
    # At one moment there is at most one message per sender.  Links of even number go first, so that neighbouring links
    # carry theirs in two rounds and not one after the other along the pipeline.
    yield (event.end, 0, min(rank, other) % 2, 2 * rank), rank, send
    yield (event.end, 0, min(rank, other) % 2, 2 * rank + 1), other, send.partner


def _moment(element: Element) -> Moment:
    return element[0]
