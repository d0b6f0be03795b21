"""Pictures of a timeline: a text grid for the terminal, an SVG for everything else.  Time runs right, a row per rank.

The grid is drawn with as much detail as fits the width: with labels (`F3`, or `5F3` where a rank has several chunks),
else with one letter per action, and that in several bands below each other if the schedule is long.  Lower-case
letters are a rank's second chunk (fourth, …).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil

from engine.report.svg import group, line, picture, rect, round_ticks, text
from engine.schedules.action import Kind
from engine.schedules.simulate import Event, Timeline

IDLE = "."
MEANING = {Kind.F: "forward", Kind.B: "backward, input", Kind.W: "backward, weights", Kind.BW: "backward"}

COLORS = {Kind.F: (125, 174, 247), Kind.B: (249, 178, 78), Kind.W: (118, 200, 147), Kind.BW: (242, 143, 121)}
ROW_PX, BAR_PX, LEFT_PX, RIGHT_PX, TOP_PX = 34, 28, 66, 76, 84
MIN_PLOT_PX, MAX_PLOT_PX = 640, 4000
EVENT_PX = 24                                      # wide enough for a number


def schedule_grid(timeline: Timeline, width: int = 100) -> str:
    """The timeline as plain text, no line longer than `width` characters (at least 40 are used)."""
    margin = len(f"rank {timeline.schedule.num_stages - 1} |")
    columns = max(width, 40) - margin
    shortest = _shortest(timeline)
    scale = max((len(_label(timeline, event)) + 1) / max(event.end - event.start, shortest)
                for events in timeline.events for event in events)              # columns per unit of time
    fits = ceil(timeline.elapsed * scale) <= columns
    if not fits:
        scale = 1 / shortest
    rows = [_row(timeline, events, scale, _labelled_cell if fits else _letter_cell) for events in timeline.events]
    lines: list[str] = []
    for start in range(0, len(rows[0]), columns):
        lines += ["", *(f"{f'rank {rank}':{margin - 1}}|{row[start:start + columns]}" for rank, row in enumerate(rows)),
                  " " * (margin - 1) + _ruler(start, min(columns, len(rows[0]) - start), scale)]
    return "\n".join([row.rstrip() for row in lines[1:]] + ["", _key(timeline, lower_case=not fits)])


def schedule_svg(timeline: Timeline) -> str:
    """The timeline as an `<svg>` element for a page that has the `STYLE` of `engine.report.svg`."""
    schedule = timeline.schedule
    plot = min(max(timeline.elapsed / _shortest(timeline) * EVENT_PX, MIN_PLOT_PX), MAX_PLOT_PX)
    scale = plot / timeline.elapsed
    width, bottom = ceil(LEFT_PX + plot + RIGHT_PX), TOP_PX + ROW_PX * schedule.num_stages
    body = [text(16, 28, title(timeline), "title"), *_svg_legend(timeline),
            text(width - 12, TOP_PX - 10, "peak held", anchor="end")]
    for rank, events in enumerate(timeline.events):
        top = TOP_PX + ROW_PX * rank
        middle = top + BAR_PX / 2 + 4
        body += [text(LEFT_PX - 10, middle, f"rank {rank}", anchor="end"), rect(LEFT_PX, top, plot, BAR_PX, "idle"),
                 text(width - 12, middle, str(timeline.peak_in_flight[rank]), anchor="end"),
                 *(_svg_bar(timeline, event, rank, scale) for event in events)]
    for tick in _ticks(timeline.elapsed, plot / 80):
        x = LEFT_PX + tick * scale
        body += [line(x, bottom, x, bottom + 5, "grid"), text(x, bottom + 19, number(tick), anchor="middle")]
    return picture(width, bottom + 30, title(timeline), body, "schedule", scales=False)


def title(timeline: Timeline) -> str:
    """One line: what it is, and what it costs."""
    schedule = timeline.schedule
    chunks = f" × {schedule.num_chunks} chunks" if schedule.num_chunks > 1 else ""
    return (f"{schedule.name}: {schedule.num_stages} stages{chunks}, {schedule.num_microbatches} microbatches — "
            f"bubble {timeline.bubble:.2%}, T = {number(timeline.makespan)}")


def number(value: float) -> str:
    """`33`, `28.5`, `1,971,752`: never with an exponent unless it is tiny."""
    return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:,g}"


def _shortest(timeline: Timeline) -> float:
    """The shortest action that is worth a column: at least a twelfth of a chunk's work."""
    least = timeline.costs.work / timeline.schedule.num_chunks / 12
    return min(length for events in timeline.events for event in events if (length := event.end - event.start) >= least)


def _label(timeline: Timeline, event: Event) -> str:
    action = event.action
    return str(action) if timeline.schedule.num_chunks > 1 else f"{action.kind}{action.microbatch}"


def _labelled_cell(timeline: Timeline, event: Event, columns: int) -> str:
    return _label(timeline, event)[:columns].ljust(columns)


def _letter_cell(timeline: Timeline, event: Event, columns: int) -> str:
    """`F`, `B` or `W` over the whole length; `BW` shows where B would end."""
    kind, costs = event.action.kind, timeline.costs
    letters = kind.value * columns
    if kind is Kind.BW and columns:
        num_b = round(columns * costs.backward / costs.of(kind))
        letters = "B" * num_b + "W" * (columns - num_b)
    return letters.lower() if _local_chunk(timeline, event) % 2 else letters


def _local_chunk(timeline: Timeline, event: Event) -> int:
    return event.action.chunk // timeline.schedule.num_stages


def _row(timeline: Timeline, events: tuple[Event, ...], scale: float,
         cell: Callable[[Timeline, Event, int], str]) -> str:
    row = ""
    for event in events:
        start, end = round(event.start * scale), round(event.end * scale)
        row += IDLE * (start - len(row)) + cell(timeline, event, end - start)
    return row + IDLE * (ceil(timeline.elapsed * scale) - len(row))


def _ruler(first_column: int, num_columns: int, scale: float) -> str:
    """Times under the columns they stand for."""
    ruler = ""
    for tick in _ticks((first_column + num_columns) / scale, (first_column + num_columns) / 14):
        column = round(tick * scale) - first_column
        if column >= len(ruler) + (2 if ruler else 0) and column + len(number(tick)) < num_columns:
            ruler = ruler.ljust(column) + f" {number(tick)}"
    return ruler


def _key(timeline: Timeline, lower_case: bool) -> str:
    kinds = _kinds(timeline)
    second = ["lower case: every second chunk"] if lower_case and timeline.schedule.num_chunks > 1 else []
    return "   ".join([*(f"{kind} {MEANING[kind]}" for kind in kinds), f"{IDLE} idle", *second])


def _kinds(timeline: Timeline) -> list[Kind]:
    used = {event.action.kind for events in timeline.events for event in events}
    return [kind for kind in Kind if kind in used]


def _ticks(stop: float, count: float) -> list[float]:
    """Round numbers from 0 to `stop`, at most about `count` of them; whole ones where they can be."""
    return round_ticks(0.0, stop, max(count, 1), factors=(1, 2, 5))


def _svg_legend(timeline: Timeline) -> Iterator[str]:
    left = 16.0
    chunks = timeline.schedule.num_chunks
    for kind in _kinds(timeline):
        for chunk in range(chunks):
            yield rect(left + 14 * chunk, 42, 14, 14, "bar", fill=_color(kind, chunk, chunks))
        words = f"{kind} {MEANING[kind]}"
        yield text(left + 14 * chunks + 7, 53, words)
        left += 14 * chunks + 28 + 6.3 * len(words)
    if chunks > 1:
        yield text(left, 53, "the lighter, the later the chunk")


def _svg_bar(timeline: Timeline, event: Event, rank: int, scale: float) -> str:
    x, y = LEFT_PX + event.start * scale, TOP_PX + ROW_PX * rank
    width = (event.end - event.start) * scale
    color = _color(event.action.kind, _local_chunk(timeline, event), timeline.schedule.num_chunks)
    microbatch = str(event.action.microbatch)
    label = [text(x + width / 2, y + BAR_PX / 2 + 4, microbatch, "number", "middle")]
    return group(rect(x, y, width, BAR_PX, "bar", fill=color), *(label if width >= 7 * len(microbatch) + 3 else []),
                 hint=f"{event.action}: {number(event.start)} to {number(event.end)}")


def _color(kind: Kind, local_chunk: int, num_chunks: int) -> str:
    """The kind's colour, mixed with white for the later chunks."""
    white = 0.62 * local_chunk / max(num_chunks - 1, 1)
    return "#" + "".join(f"{round(part + (255 - part) * white):02x}" for part in COLORS[kind])
