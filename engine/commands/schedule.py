"""`octant schedule`: a pipeline schedule as a picture, with its bubble and its memory."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from shutil import get_terminal_size

from engine.hints import hint
from engine.report.schedule_picture import number, schedule_grid, schedule_svg, title
from engine.report.svg import standalone
from engine.schedules.lowering import lower
from engine.schedules.simulate import Costs, Timeline, simulate
from engine.schedules.table import build_schedule, default_num_chunks, schedule_names
from engine.writing import write_picture


def run(args: Namespace) -> int:
    """Prints the schedule `args.name` as a grid or as JSON, and draws it where asked.

    Raises:
        ConfigError: no such schedule, or impossible counts.
        RequestError: impossible costs, or the picture cannot be written.
    """
    num_chunks = default_num_chunks(args.name) if args.chunks is None else args.chunks
    schedule = build_schedule(args.name, args.stages, args.microbatches, num_chunks)
    costs = Costs(args.cost_forward, args.cost_backward, args.cost_weight, args.cost_comm)
    timeline = simulate(schedule, costs)
    if args.svg:
        write_picture(Path(args.svg), standalone(schedule_svg(timeline)))
    if args.json:
        print(json.dumps(_as_json(timeline), indent=1))
        return 0
    print(title(timeline), schedule_grid(timeline, get_terminal_size().columns), sep="\n\n", end="\n\n")
    print(*_summary(timeline), sep="\n")
    if args.svg:
        print(f"drawn in {args.svg}")
    print(_next(timeline))
    return 0


def _as_json(timeline: Timeline) -> dict[str, object]:
    """Times in the unit of the costs; one list per rank of the computations, and of the whole program it executes."""
    programs = lower(timeline.schedule).programs
    return {"makespan": timeline.makespan, "bubble": timeline.bubble, "elapsed": timeline.elapsed,
            "peak_in_flight": timeline.peak_in_flight,
            "actions": [[str(event.action) for event in events] for events in timeline.events],
            "programs": [[str(action) for action in program] for program in programs]}


def _summary(timeline: Timeline) -> Iterator[str]:
    schedule, elapsed = timeline.schedule, timeline.elapsed
    work = schedule.num_microbatches * timeline.costs.work
    yield (f"T {number(timeline.makespan)} = work {number(work)} + bubble {number(timeline.bubble_time)} "
           f"({timeline.bubble:.2%} of T)")
    if elapsed > timeline.makespan:
        yield (f"T is the longest that one rank needs; from the first start to the last end it takes\n"
               f"{number(elapsed)}, which is the time of a step when the ranks meet in the optimizer")
    unit = "" if schedule.num_chunks == 1 else f", each 1/{schedule.num_chunks} of a stage"
    yield f"peak activations in flight by rank{unit}: {' '.join(map(str, timeline.peak_in_flight))}"


def _next(timeline: Timeline) -> str:
    """The next schedule in the table at the same size; after the last one, training with it."""
    schedule, names = timeline.schedule, schedule_names()
    position = names.index(schedule.name) + 1
    if position < len(names):
        return hint("schedule", names[position], "--stages", schedule.num_stages, "--microbatches",
                    schedule.num_microbatches)
    return (f"next: train with one of them: parallel.pipeline={schedule.num_stages} parallel.schedule={schedule.name} "
            f"parallel.virtual_stages={schedule.num_chunks}")
