"""Checks a schedule before anything runs, and shows where it is wrong.

Two questions.  Is everything there: F, B and W of every chunk and microbatch exactly once, on the rank that holds the
chunk?  And does it get to the end: a walk through the programs must not stop before every rank has finished?
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from engine.errors import ConfigError
from engine.schedules.action import Action, Kind
from engine.schedules.program import Program, Schedule, missing_input, walk

GRID_WIDTH = 100                                             # characters, without the ranks


def validate(schedule: Schedule) -> None:
    """Checks that every chunk runs F, B and W once per microbatch, in an order that gets to the end.

    A lowered schedule is also checked for messages that never meet.

    Raises:
        ConfigError: an action is missing, doubled or on the wrong rank, comes before its inputs, or ranks wait for each
            other in a circle.  The message shows the programs around the offending cell.
    """
    seen: set[Action] = set()
    for rank, program in enumerate(schedule.programs):
        for position, action in enumerate(program):
            if problem := _misplaced(schedule, rank, action, seen):
                raise _error(schedule, rank, position, problem)
            seen.update(action.parts)
    for chunk, rank in enumerate(schedule.placement):
        for m in range(schedule.num_microbatches):
            for kind in (Kind.F, Kind.B, Kind.W):
                if (action := Action(kind, m, chunk)) not in seen:
                    raise _error(schedule, rank, len(schedule.programs[rank]), f"{action} is missing")
    _check_progress(schedule)


def program_grid(programs: Sequence[Program], rank: int, position: int) -> str:
    """The programs around `position`, a row per rank, with that cell of `rank` in brackets.

    `position` may be one past the end of the program: the mark then stands where something is missing.
    """
    width = 2 + max(len(str(action)) for program in programs for action in program)      # with the brackets
    num_columns = GRID_WIDTH // (width + 1)
    first = max(0, position - num_columns // 2)
    columns = range(first, first + num_columns)
    rows = [[str(program[i]) if i < len(program) else "" for i in columns] for program in programs]
    rows[rank][position - first] = f"[{rows[rank][position - first] or 'end'}]"
    lines = ["position " + " ".join(f"{i:^{width}}" for i in columns)]
    lines += [f"rank {i:<3} " + " ".join(f"{cell:^{width}}" for cell in row) for i, row in enumerate(rows)]
    lines[rank + 1] = lines[rank + 1].rstrip() + "  <-- here"
    return "\n".join(f"  {line.rstrip()}" for line in lines)


def _misplaced(schedule: Schedule, rank: int, action: Action, seen: set[Action]) -> str | None:
    last_chunk, last_microbatch = len(schedule.placement) - 1, schedule.num_microbatches - 1
    if not (0 <= action.chunk <= last_chunk and 0 <= action.microbatch <= last_microbatch):
        return f"{action} does not exist: chunks are 0 … {last_chunk}, microbatches 0 … {last_microbatch}"
    if schedule.placement[action.chunk] != rank:
        return f"{action} is on rank {rank}, but chunk {action.chunk} lives on rank {schedule.placement[action.chunk]}"
    again = next((part for part in action.parts if part in seen), None)
    return None if again is None else f"{again} is done twice"


def _check_progress(schedule: Schedule) -> None:
    position = [0] * schedule.num_stages
    done: set[Action] = set()
    for rank, action in walk(schedule):
        position[rank] += 1
        done.update(action.parts)
    waits: list[tuple[float, int, str]] = []                 # how far ahead what it waits for is, rank, in words
    for rank, program in enumerate(schedule.programs):
        if position[rank] == len(program):
            continue
        action = program[position[rank]]
        missing = missing_input(schedule, action, done, waiting=())
        assert missing is not None
        owner = schedule.placement[missing.chunk]
        ahead = _distance(schedule.programs[owner][position[owner]:], missing)
        if owner == rank and ahead < inf:                    # no other rank is to blame
            raise _error(schedule, rank, position[rank], f"{action} comes before {missing}")
        waits.append((ahead, rank, f"\n  rank {rank} waits at {action} for {missing}"))
    if waits:
        _, rank, _ = max(waits)                              # likely the one that is out of order
        raise _error(schedule, rank, position[rank], "deadlock" + "".join(text for _, _, text in waits))


def _distance(program: Sequence[Action], wanted: Action) -> float:
    """How many actions come before `wanted`; infinity where it does not come at all."""
    return next((i for i, action in enumerate(program) if wanted in action.parts), inf)


def _error(schedule: Schedule, rank: int, position: int, problem: str) -> ConfigError:
    size = f"{schedule.num_stages} stages × {schedule.num_chunks} chunk(s), {schedule.num_microbatches} microbatches"
    return ConfigError(f"schedule {schedule.name} ({size}) cannot run: {problem}\n"
                       + program_grid(schedule.programs, rank, position))
