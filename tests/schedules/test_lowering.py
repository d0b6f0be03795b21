"""Lowered programs: complete, in an order that cannot deadlock, and fast."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import pytest

from engine.errors import ConfigError
from engine.schedules.action import Action, Kind
from engine.schedules.lowering import lower
from engine.schedules.program import Schedule
from engine.schedules.simulate import Costs, simulate
from engine.schedules.table import build_schedule
from engine.schedules.validate import validate

SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 4), ("zb-h1", 1), ("zb-h2", 1), ("zb-v", 2)]
SIZES = [(p, m) for p in range(1, 17) for m in (1, 2, 7, 16, 33)] + [(2, 64), (7, 64), (16, 64)]
SEND = {Kind.SEND_F: (Kind.RECV_F, +1), Kind.SEND_B: (Kind.RECV_B, -1)}
RECV = {Kind.RECV_F, Kind.RECV_B}


def rendezvous(schedule: Schedule) -> list[Action] | None:
    """Runs lowered programs on a network where SEND and RECV wait for each other; None if they wait for ever.

    Knows nothing of how the programs were made: a rank may use only what it computed or received itself.
    """
    position = [0] * schedule.num_stages
    holds: list[set[tuple[str, int, int]]] = [set() for _ in range(schedule.num_stages)]   # (output | gradient, c, m)
    last, executed = len(schedule.placement) - 1, []

    def current(rank: int) -> Action | None:
        return schedule.programs[rank][position[rank]] if position[rank] < len(schedule.programs[rank]) else None

    def compute(rank: int, action: Action) -> None:
        c, m = action.chunk, action.microbatch
        if action.kind is Kind.F:
            assert c == 0 or ("output", c - 1, m) in holds[rank]
            holds[rank].add(("output", c, m))
        elif action.kind in (Kind.B, Kind.BW):
            assert ("output", c, m) in holds[rank] and (c == last or ("gradient", c + 1, m) in holds[rank])
            holds[rank].add(("gradient", c, m))
        elif action.kind is Kind.W:
            assert ("gradient", c, m) in holds[rank]

    moved = True
    while moved:
        moved = False
        for rank in range(schedule.num_stages):
            while (action := current(rank)) is not None and action.kind not in SEND and action.kind not in RECV:
                compute(rank, action)
                executed.append(action)
                position[rank] += 1
                moved = True
            if action is not None and action.kind in SEND:
                kind, step = SEND[action.kind]
                other = schedule.placement[action.chunk + step]
                if current(other) == Action(kind, action.microbatch, action.chunk + step):
                    what = "output" if action.kind is Kind.SEND_F else "gradient"
                    assert (what, action.chunk, action.microbatch) in holds[rank] and other != rank
                    holds[other].add((what, action.chunk, action.microbatch))
                    executed.append(action)
                    position[rank] += 1
                    position[other] += 1
                    moved = True
    return executed if all(current(rank) is None for rank in range(schedule.num_stages)) else None


@pytest.mark.parametrize(("name", "num_chunks"), SCHEDULES)
def test_no_deadlock_when_every_message_is_a_blocking_rendezvous(name: str, num_chunks: int) -> None:
    for num_stages, num_microbatches in SIZES:
        lowered = lower(build_schedule(name, num_stages, num_microbatches, num_chunks))
        assert rendezvous(lowered) is not None, (num_stages, num_microbatches)
        early = replace(lowered, programs=tuple(map(hoisted, lowered.programs)))
        assert rendezvous(early) is not None, (num_stages, num_microbatches)


def naive(schedule: Schedule) -> Schedule:
    """Receive right before use and send right after."""
    programs = []
    for program in schedule.programs:
        actions: list[Action] = []
        for a in program:
            forward, backward = a.kind is Kind.F, a.kind is Kind.BW
            if (forward and schedule.crosses(a.chunk)) or (backward and schedule.crosses(a.chunk + 1)):
                actions.append(Action(Kind.RECV_F if forward else Kind.RECV_B, a.microbatch, a.chunk))
            actions.append(a)
            if (forward and schedule.crosses(a.chunk + 1)) or (backward and schedule.crosses(a.chunk)):
                actions.append(Action(Kind.SEND_F if forward else Kind.SEND_B, a.microbatch, a.chunk))
        programs.append(tuple(actions))
    return replace(schedule, programs=tuple(programs))


def test_the_naive_order_deadlocks_in_1f1b_and_is_refused() -> None:
    assert rendezvous(naive(build_schedule("gpipe", 4, 8))) is not None
    for p in (2, 3, 4, 8):
        schedule = naive(build_schedule("1f1b", p, 8))
        assert rendezvous(schedule) is None
        with pytest.raises(ConfigError, match="deadlock\n  rank 0 waits at 0SEND_F"):
            validate(schedule)


@pytest.mark.parametrize(("name", "num_chunks"), SCHEDULES)
def test_lowering_adds_messages_and_reductions_and_changes_nothing_else(name: str, num_chunks: int) -> None:
    for num_stages, num_microbatches in ((1, 3), (2, 5), (4, 8), (5, 7)):
        schedule = build_schedule(name, num_stages, num_microbatches, num_chunks)
        lowered = lower(schedule)
        validate(lowered)
        computed = tuple(tuple(a for a in program if a.kind.is_compute) for program in lowered.programs)
        assert computed == schedule.programs
        added = [a for program in lowered.programs for a in program if not a.kind.is_compute]
        crossings = sum(schedule.crosses(chunk) for chunk in range(len(schedule.placement)))
        reductions = len(schedule.placement)
        assert len(added) == len(set(added)) == 4 * crossings * num_microbatches + reductions
        for program in lowered.programs:
            for position, action in enumerate(program):
                if action.kind is Kind.REDUCE_GRAD:
                    assert_follows_the_last_gradient(program, position)


def assert_follows_the_last_gradient(program: Sequence[Action], position: int) -> None:
    """Only messages stand between the last W or BW of the chunk and its REDUCE_GRAD."""
    last = max(i for i, a in enumerate(program) if a.chunk == program[position].chunk and a.kind.makes_weight_gradient)
    assert last < position
    assert all(a.kind.is_communication for a in program[last + 1:position])


def test_neighbours_on_one_rank_exchange_no_messages() -> None:
    turn = [a for program in lower(build_schedule("zb-v", 4, 8, 2)).programs for a in program
            if a.kind.is_communication and {a.chunk, a.partner.chunk} == {3, 4}]
    assert turn == []
    assert not lower(build_schedule("interleaved", 1, 4, 2)).is_lowered


@pytest.mark.parametrize(("name", "num_chunks"), SCHEDULES)
def test_messages_between_two_ranks_are_received_in_the_order_they_are_sent(name: str, num_chunks: int) -> None:
    """So a transport without tags delivers the right ones."""
    sent, received = defaultdict(list), defaultdict(list)
    lowered = lower(build_schedule(name, 4, 10, num_chunks))
    for rank, program in enumerate(lowered.programs):
        for action in (a for a in program if a.kind.is_communication):
            other = lowered.placement[action.partner.chunk]
            if action.kind in SEND:
                sent[rank, other].append(action)
            else:
                received[other, rank].append(action.partner)
    assert sent == received and sent


def hoisted(program: Sequence[Action]) -> tuple[Action, ...]:
    """Each RECV started before the computation that it directly follows."""
    out: list[Action] = []
    for action in program:
        out.insert(len(out) - (action.kind in RECV and bool(out) and out[-1].kind.is_compute), action)
    return tuple(out)


def elapsed_without_blocking(schedule: Schedule, costs: Costs) -> float:
    """Time of lowered programs when messages start in program order, travel by themselves, and are awaited at use."""
    programs = [hoisted(program) for program in schedule.programs]
    clock, position = [0.0] * schedule.num_stages, [0] * schedule.num_stages
    started: dict[Action, float] = {}
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            while position[rank] < len(program):
                action = program[position[rank]]
                if action.kind.is_communication:
                    started[action] = clock[rank]
                else:
                    kind = Kind.RECV_F if action.kind is Kind.F else Kind.RECV_B
                    message = Action(kind, action.microbatch, action.chunk)
                    if message in started and action.kind not in (Kind.W, Kind.REDUCE_GRAD):
                        if message.partner not in started:
                            break
                        arrival = max(started[message], started[message.partner]) + costs.communication
                        clock[rank] = max(clock[rank], arrival)
                    if action.kind.is_compute:
                        clock[rank] += costs.of(action.kind) / schedule.num_chunks
                position[rank] += 1
                moved = True
    assert all(position[rank] == len(program) for rank, program in enumerate(programs))
    return max(clock)


@pytest.mark.parametrize(("name", "num_chunks"), SCHEDULES)
@pytest.mark.parametrize("costs", [Costs(1, 1, 1, 0.2), Costs(18522, 18086, 9337, 601), Costs(1, 1.2, 0.8, 0.1)])
def test_an_executor_that_does_not_block_takes_the_simulated_time(name: str, num_chunks: int, costs: Costs) -> None:
    """Although the order was chosen for other costs."""
    slack = 0.03 if num_chunks > 2 else 1e-9
    for p, m in ((2, 4), (4, 8), (8, 24)):
        schedule = build_schedule(name, p, m, num_chunks)
        simulated = simulate(schedule, costs).elapsed
        assert elapsed_without_blocking(lower(schedule), costs) == pytest.approx(simulated, slack)
