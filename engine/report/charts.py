"""Line charts, light and dark, that are read by pointing at them.

A chart is a frame, a few grid lines at round numbers, and one path per series.  Three things make it honest and
readable for runs of any length:

* A run of 350,000 steps has more points than the picture has pixels.  Each pixel column keeps its smallest and its
  largest value, so a spike of a single step stays visible, which averaging or taking every n-th point would lose.
* One slow first step would flatten the rest of a speed chart.  A chart may be `clipped`: the axis covers the central
  values, and the legend says how many points lie outside.
* Values are read by pointing at the chart.  Transparent strips light up a cross-hair and its numbers by CSS `:hover`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from engine.report.svg import (
    CHARACTER,
    Axis,
    color_of,
    dot,
    element,
    group,
    line,
    number,
    picture,
    rect,
    text,
)

Point = tuple[float, float | None]              # (step, value); None breaks the line

LEFT, RIGHT, TOP, BOTTOM = 58, 18, 58, 38       # margins of the plot inside the picture, pixels
HOVER_STRIPS = 120
MAX_MARKS = 1000


@dataclass(frozen=True)
class Series:
    """One line of a chart, its points in ascending order of step; without a label it is drawn but not named."""

    label: str
    points: Sequence[Point]
    color: int = 0
    style: Literal["line", "faint", "dashed"] = "line"      # faint: behind its own average; dashed: few points, dotted


@dataclass(frozen=True)
class Chart:
    """What to draw.

    Attributes:
        title: the quantity and its unit; unique on a page.
        series: back to front.
        log: logarithmic y-axis; only where every value is positive.
        from_zero: the y-axis begins at zero.
        clipped: the y-axis covers the central values, and some room around them.
        marks: steps to be marked at the foot of the plot.
        mark_label: what the marks mean.
        lines: steps to be marked from head to foot, and what is said when one points at the mark.
        width, height: of the picture in pixels.
        across: what the x-axis counts.
    """

    title: str
    series: Sequence[Series]
    log: bool = False
    from_zero: bool = False
    clipped: bool = False
    marks: Sequence[int] = ()
    mark_label: str = ""
    lines: Sequence[tuple[int, str]] = ()
    width: int = 560
    height: int = 260
    across: str = "step"

    @property
    def right(self) -> int:
        """Right edge of the plot."""
        return self.width - RIGHT

    @property
    def foot(self) -> int:
        """Lower edge of the plot."""
        return self.height - BOTTOM


def line_chart(chart: Chart) -> str:
    """The chart as an `<svg>` element for a page that has the `STYLE` of `engine.report.svg`."""
    x, y = _axes(chart)
    clip = _identifier(f"{chart.title} {chart.width}")
    marks = (line(x(step), chart.foot, x(step), chart.foot - 9, "mark") for step in chart.marks[:MAX_MARKS])
    return picture(chart.width, chart.height, chart.title, [
        text(16, 24, chart.title, "title"), *_legend(chart, y), *_frame(chart, x, y),
        *(line(x(step), TOP, x(step), chart.foot, "change") for step, _ in lines_of(chart, x)),
        element("clipPath", rect(LEFT, TOP - 2, chart.right - LEFT + 4, chart.foot - TOP + 4), id=clip),
        group(*(_path(series, x, y) for series in chart.series), *marks, clip_path=f"url(#{clip})"),
        *_hover(chart, x, y),
        *(group(rect(x(step) - 4, TOP, 8, chart.foot - TOP, fill="transparent"), hint=f"after step {step:,}: {words}")
          for step, words in lines_of(chart, x))])


def lines_of(chart: Chart, x: Axis) -> list[tuple[int, str]]:
    """The lines from head to foot that stand inside the plot."""
    return [(step, words) for step, words in chart.lines if x.low <= step <= x.high][:MAX_MARKS]


def moving_median(points: Sequence[Point], window: int) -> list[Point]:
    """Median over `window` neighbouring points (an odd number), centred; points without a value are left out.

    A median, because one step with a spike would shift a mean over the whole window.
    """
    known = [(step, value) for step, value in points if value is not None]
    inside: list[float] = []                                 # the values of the window, sorted
    first = last = 0                                         # the window is known[first:last]
    medians: list[Point] = []
    for i, (step, _) in enumerate(known):
        while last <= min(i + window // 2, len(known) - 1):
            insort(inside, known[last][1])
            last += 1
        while first < i - window // 2:
            inside.pop(bisect_left(inside, known[first][1]))
            first += 1
        medians.append((step, inside[len(inside) // 2]))
    return medians


def _axes(chart: Chart) -> tuple[Axis, Axis]:
    steps = [step for series in chart.series for step, _ in series.points]
    values = sorted(value for series in chart.series for _, value in series.points if value is not None)
    log = chart.log and bool(values) and values[0] > 0
    low, high = _span(chart, values, log)
    first, last = min(steps, default=0), max(steps, default=1)
    if first < 0.1 * last:
        first = 0
    return (Axis(first, last if last > first else first + 1, LEFT, chart.right),
            Axis(low, high, chart.foot, TOP, log))


def _span(chart: Chart, values: list[float], log: bool) -> tuple[float, float]:
    """Lowest and highest value of the y-axis."""
    if not values:
        return 0.0, 1.0
    low, high = values[0], values[-1]
    if log:
        if chart.clipped:
            middle_low, middle_high = central(values)
            room = max(middle_high / middle_low, 10.0)       # as many decades as they cover, and at least one
            low, high = max(low, middle_low / room), min(high, middle_high * room)
        return low / 1.15, high * 1.15
    if chart.clipped:
        middle_low, middle_high = central(values)
        room = 2 * max(middle_high - middle_low, 0.1 * abs(middle_high))
        low, high = max(low, middle_low - room), min(high, middle_high + room)
    if chart.from_zero:
        low = min(low, 0.0)
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low if chart.from_zero and low == 0 else low - pad, high + pad


def central(values: Sequence[float]) -> tuple[float, float]:
    """The ends of the central 96 % of sorted values."""
    margin = len(values) // 50
    return values[margin], values[-1 - margin]


def _frame(chart: Chart, x: Axis, y: Axis) -> list[str]:
    """Grid lines and their numbers."""
    lines = []
    for tick in y.ticks(5):
        lines += [line(LEFT, y(tick), chart.right, y(tick), "grid"),
                  text(LEFT - 8, y(tick) + 4, number(tick), anchor="end")]
    lines += [text(x(tick), chart.foot + 17, number(tick), anchor="middle")
              for tick in x.ticks(chart.width // 80) if tick.is_integer()]
    return [*lines, text(chart.right, chart.height - 5, chart.across, anchor="end")]


def _legend(chart: Chart, y: Axis) -> list[str]:
    """The second line of the picture: names of the series, marks, and what lies off the scale."""
    named = [series for series in chart.series if series.label] if len(chart.series) > 1 else []
    marks = f"{len(chart.marks):,} {chart.mark_label}" if chart.marks else ""
    note = _off_scale(chart, y)
    room = (chart.width - 32 - CHARACTER * (len(marks) + len(note) + 6)) / max(len(named), 1)
    parts, left = [], 16.0
    for series in named:
        label = _shortened(series.label, room - 42)
        parts += [line(left, 40, left + 18, 40, series.style, style=f"stroke:{color_of(series.color)}"),
                  text(left + 24, 44, label)]
        left += 42 + CHARACTER * len(label)
    if marks:
        parts += [line(left + 3, 36, left + 3, 45, "mark"), text(left + 10, 44, marks)]
        left += 28 + CHARACTER * len(marks)
    return [*parts, text(left, 44, note)]


def _off_scale(chart: Chart, y: Axis) -> str:
    behind = [series for series in chart.series if series.style == "faint"]
    outside = [value for series in behind or chart.series for _, value in series.points
               if value is not None and not y.low <= value <= y.high]
    if not outside:
        return ""
    noun = "point" if len(outside) == 1 else "points"
    return f"{len(outside):,} {noun} off the scale, up to {number(max(outside, key=abs))}"


def _shortened(label: str, pixels: float) -> str:
    length = max(3, int(pixels / CHARACTER))
    return label if len(label) <= length else label[:length - 1] + "…"


def _path(series: Series, x: Axis, y: Axis) -> str:
    path = element("path", class_=series.style, style=f"stroke:{color_of(series.color)}",
                   d=_commands(series.points, x, y))
    known = [(step, value) for step, value in series.points if value is not None]
    if len(known) == 1 or (series.style == "dashed" and len(known) <= 60):
        path += "".join(dot(x(step), y(value), 3.5, series.color) for step, value in known)
    return path


def _commands(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """The path's moves and lines; at most two points for each pixel column between two gaps."""
    commands, pen = [], "M"
    column: list[tuple[float, float]] = []

    def flush() -> None:
        nonlocal pen
        for index in sorted({min(range(len(column)), key=lambda i: column[i][1]),
                             max(range(len(column)), key=lambda i: column[i][1])} if column else ()):
            commands.append(f"{pen}{column[index][0]:.1f},{column[index][1]:.1f}")
            pen = "L"
        column.clear()

    for step, value in points:
        if value is None:
            flush()
            pen = "M"
            continue
        if column and int(column[0][0]) != int(x(step)):
            flush()
        column.append((x(step), y(value)))
    flush()
    return "".join(commands)


def _hover(chart: Chart, x: Axis, y: Axis) -> list[str]:
    """Strips over the plot that show a cross-hair and the values under it; the last values when pointing elsewhere."""
    known = [[(step, value) for step, value in series.points if value is not None] for series in chart.series]
    steps = sorted({step for points in known for step, _ in points})
    if not steps:
        return [text(chart.width / 2, chart.height / 2, "no values", anchor="middle")]
    shown = sorted({steps[round(i * (len(steps) - 1) / (HOVER_STRIPS - 1))] for i in range(HOVER_STRIPS)})
    edges = [LEFT, *((x(a) + x(b)) / 2 for a, b in pairwise(shown)), chart.right]
    strips = [_strip(chart, known, step, left, right, x, y)
              for step, (left, right) in zip(shown, pairwise(edges), strict=True)]
    return [group(*strips, kind="tips"), group(_readout(chart, known, steps[-1]), kind="last")]


def _strip(chart: Chart, known: list[list[tuple[float, float]]], step: float, left: float, right: float,
           x: Axis, y: Axis) -> str:
    dots = [dot(x(point[0]), min(max(y(point[1]), TOP), chart.foot), 4, series.color)
            for series, points in zip(chart.series, known, strict=True) if (point := _at(points, step))]
    return group(rect(left, TOP, max(right - left, 0.1), chart.foot - TOP),
                 line(x(step), TOP, x(step), chart.foot, "hair"), *dots, _readout(chart, known, step), kind="tip")


def _readout(chart: Chart, known: list[list[tuple[float, float]]], step: float) -> str:
    parts = [f"{chart.across} {step:,.0f}"]
    for series, points in zip(chart.series, known, strict=True):
        if series.label and (point := _at(points, step)):
            parts.append(f"{series.label} {number(point[1])}")
    words, room = " · ".join(parts), chart.width - 40 - 8.5 * len(chart.title) - RIGHT
    too_long = CHARACTER * len(words) > room
    return text(chart.right, 24, words, "number", "end", textLength=room if too_long else "",
                lengthAdjust="spacingAndGlyphs" if too_long else "")


def _at(points: list[tuple[float, float]], step: float) -> tuple[float, float] | None:
    """The latest point at or before `step`."""
    index = bisect_right(points, step, key=_step_of)
    return points[index - 1] if index else None


def _step_of(point: tuple[float, float]) -> float:
    return point[0]


def _identifier(text: str) -> str:
    return "clip-" + "".join(c if c.isalnum() else "-" for c in text.lower())
