"""Line charts as SVG, written by hand: no plotting library, no script, light and dark.

A chart is text: a frame, a few grid lines at round numbers, and one path per series.  Three things make it honest and
readable for runs of any length:

* A run of 350,000 steps has more points than the picture has pixels.  Each pixel column keeps its smallest and its
  largest value, so a spike of a single step stays visible, which averaging or taking every n-th point would lose.
* One slow first step would flatten the rest of a speed chart.  A chart may be `clipped`: the axis covers the central
  values, and the legend says how many points lie outside.
* Values are read by pointing at the chart.  Transparent strips light up a cross-hair and its numbers by CSS `:hover`.

Colours are CSS variables that follow the reader's light or dark setting, in a browser as in a stand-alone file.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Literal

Point = tuple[float, float | None]              # (step, value); None breaks the line

LEFT, RIGHT, TOP, BOTTOM = 58, 18, 58, 38       # margins of the plot inside the picture, pixels
HOVER_STRIPS = 120
MAX_MARKS = 1000
CHARACTER = 6.4                                 # width of an average character, pixels
NUM_COLORS = 6

STYLE = """
svg.chart { --ink: #1c2430; --muted: #667085; --grid: #e6e9ef; --paper: #ffffff; --alert: #d92d20;
  --c0: #2563eb; --c1: #d97706; --c2: #0d9488; --c3: #9333ea; --c4: #db2777; --c5: #64748b;
  font: 12px system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; font-variant-numeric: tabular-nums; }
@media (prefers-color-scheme: dark) { svg.chart { --ink: #e6eaf2; --muted: #94a0b4; --grid: #2a3342; --paper: #161c27;
  --alert: #f97066; --c0: #6ea8fe; --c1: #fbb040; --c2: #2dd4bf; --c3: #c084fc; --c4: #f472b6; --c5: #94a3b8; } }
svg.chart text { fill: var(--muted); }
svg.chart .title { fill: var(--ink); font-size: 14px; font-weight: 600; }
svg.chart .number { fill: var(--ink); }
svg.chart .grid { stroke: var(--grid); stroke-width: 1; }
svg.chart .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg.chart .faint { fill: none; stroke-width: 1; stroke-linejoin: round; opacity: .38; }
svg.chart .dashed { fill: none; stroke-width: 1.5; stroke-dasharray: 5 3; }
svg.chart .dot { stroke: var(--paper); stroke-width: 1; }
svg.chart .mark { stroke: var(--alert); stroke-width: 1.5; }
svg.chart .tip rect { fill: transparent; }
svg.chart .tip :not(rect) { visibility: hidden; }
svg.chart .tip:hover :not(rect) { visibility: visible; }
svg.chart .tips:hover + .last { visibility: hidden; }
svg.chart .hair { stroke: var(--muted); stroke-width: 1; stroke-dasharray: 2 2; }
"""


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
        width, height: of the picture in pixels.
    """

    title: str
    series: Sequence[Series]
    log: bool = False
    from_zero: bool = False
    clipped: bool = False
    marks: Sequence[int] = ()
    mark_label: str = ""
    width: int = 560
    height: int = 260

    @property
    def right(self) -> int:
        """Right edge of the plot."""
        return self.width - RIGHT

    @property
    def foot(self) -> int:
        """Lower edge of the plot."""
        return self.height - BOTTOM


@dataclass(frozen=True)
class Axis:
    """Maps values between `low` and `high` to pixels between `start` and `stop`."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def ticks(self, count: int) -> list[float]:
        """Round numbers on the axis, about `count` of them."""
        ticks = _log_ticks(self.low, self.high) if self.log else []
        return ticks if len(ticks) >= 3 else round_ticks(self.low, self.high, count)


def round_ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten inside [low, high]: at most about `count`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [0.0 if i == 0 else float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 1e3 else (1,)
    return [tick for e in exponents for factor in factors if low <= (tick := factor * 10.0 ** e) <= high]


def number(value: float) -> str:
    """A number for people: `3e-04`, `0.1234`, `12.3`, `1,234`, `45.6k`, `1.2M`."""
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3:
        return f"{value:.3g}"
    if size < 1e4:
        return f"{round(value):,}" if float(value).is_integer() or size >= 1e3 else f"{value:.4g}"
    exponent = min(int(math.log10(size) / 3 + 1e-9), 4)
    return f"{value / 1000 ** exponent:.4g}{'kMGT'[exponent - 1]}"


def line_chart(chart: Chart) -> str:
    """The chart as an `<svg>` element for a page that has `STYLE`."""
    x, y = _axes(chart)
    body = [
        f'<text class="title" x="16" y="24">{escape(chart.title)}</text>',
        *_legend(chart, y),
        *_frame(chart, x, y),
        f'<clipPath id="{(clip := _identifier(f"{chart.title} {chart.width}"))}"><rect x="{LEFT}" y="{TOP - 2}" '
        f'width="{chart.right - LEFT + 4}" height="{chart.foot - TOP + 4}"/></clipPath>',
        f'<g clip-path="url(#{clip})">',
        *(_path(series, x, y) for series in chart.series),
        *(f'<line class="mark" x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{chart.foot}" y2="{chart.foot - 9}"/>'
          for step in chart.marks[:MAX_MARKS]),
        "</g>",
        *_hover(chart, x, y),
    ]
    return svg(chart.width, chart.height, chart.title, body)


def svg(width: int, height: int, title: str, body: Sequence[str]) -> str:
    """An `<svg>` element that scales with its place."""
    return (f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{escape(title)}">' + "\n".join(body) + "</svg>\n")


def standalone(picture: str) -> str:
    """An `<svg>` element as a file of its own: with its style and background."""
    return picture.replace(">", f"><style>{STYLE}svg {{ background: var(--paper) }}</style>", 1)


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
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{chart.right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
                     f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x.ticks(chart.width // 80):
        if tick.is_integer():
            lines.append(f'<text x="{x(tick):.1f}" y="{chart.foot + 17}" text-anchor="middle">{number(tick)}</text>')
    lines.append(f'<text x="{chart.right}" y="{chart.height - 5}" text-anchor="end">step</text>')
    return lines


def _legend(chart: Chart, y: Axis) -> list[str]:
    """The second line of the picture: names of the series, marks, and what lies off the scale."""
    named = [series for series in chart.series if series.label] if len(chart.series) > 1 else []
    marks = f"{len(chart.marks):,} {chart.mark_label}" if chart.marks else ""
    note = _off_scale(chart, y)
    room = (chart.width - 32 - CHARACTER * (len(marks) + len(note) + 6)) / max(len(named), 1)
    parts, left = [], 16.0
    for series in named:
        label = _shortened(series.label, room - 42)
        stroke = f'style="stroke:var(--c{series.color % NUM_COLORS})"'
        parts.append(f'<line class="{series.style}" {stroke} x1="{left:.0f}" x2="{left + 18:.0f}" y1="40" y2="40"/>'
                     f'<text x="{left + 24:.0f}" y="44">{escape(label)}</text>')
        left += 42 + CHARACTER * len(label)
    if marks:
        parts.append(f'<line class="mark" x1="{left + 3:.0f}" x2="{left + 3:.0f}" y1="36" y2="45"/>'
                     f'<text x="{left + 10:.0f}" y="44">{escape(marks)}</text>')
        left += 28 + CHARACTER * len(marks)
    return [*parts, f'<text x="{left:.0f}" y="44">{note}</text>']


def _off_scale(chart: Chart, y: Axis) -> str:
    behind = [series for series in chart.series if series.style == "faint"]
    outside = [value for series in behind or chart.series for _, value in series.points
               if value is not None and not y.low <= value <= y.high]
    if not outside:
        return ""
    noun = "point" if len(outside) == 1 else "points"
    return f"{len(outside):,} {noun} off the scale, up to {number(max(outside, key=abs))}"


def _shortened(text: str, pixels: float) -> str:
    length = max(3, int(pixels / CHARACTER))
    return text if len(text) <= length else text[:length - 1] + "…"


def _path(series: Series, x: Axis, y: Axis) -> str:
    stroke = f"var(--c{series.color % NUM_COLORS})"
    path = f'<path class="{series.style}" style="stroke:{stroke}" d="{_commands(series.points, x, y)}"/>'
    known = [(step, value) for step, value in series.points if value is not None]
    if len(known) == 1 or (series.style == "dashed" and len(known) <= 60):
        path += "".join(f'<circle class="dot" style="fill:{stroke}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="3.5"/>'
                        for step, value in known)
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
        return [f'<text x="{chart.width / 2}" y="{chart.height / 2}" text-anchor="middle">no values</text>']
    shown = sorted({steps[round(i * (len(steps) - 1) / (HOVER_STRIPS - 1))] for i in range(HOVER_STRIPS)})
    edges = [LEFT, *((x(a) + x(b)) / 2 for a, b in pairwise(shown)), chart.right]
    strips = [_strip(chart, known, step, left, right, x, y)
              for step, (left, right) in zip(shown, pairwise(edges), strict=True)]
    return ['<g class="tips">', *strips, "</g>", f'<g class="last">{_readout(chart, known, steps[-1])}</g>']


def _strip(chart: Chart, known: list[list[tuple[float, float]]], step: float, left: float, right: float,
           x: Axis, y: Axis) -> str:
    dots = [f'<circle class="dot" style="fill:var(--c{series.color % NUM_COLORS})" cx="{x(point[0]):.1f}" '
            f'cy="{min(max(y(point[1]), TOP), chart.foot):.1f}" r="4"/>'
            for series, points in zip(chart.series, known, strict=True) if (point := _at(points, step))]
    return (f'<g class="tip"><rect x="{left:.1f}" y="{TOP}" width="{max(right - left, 0.1):.1f}" '
            f'height="{chart.foot - TOP}"/><line class="hair" x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{TOP}" '
            f'y2="{chart.foot}"/>{"".join(dots)}{_readout(chart, known, step)}</g>')


def _readout(chart: Chart, known: list[list[tuple[float, float]]], step: float) -> str:
    parts = [f"step {step:,.0f}"]
    for series, points in zip(chart.series, known, strict=True):
        if series.label and (point := _at(points, step)):
            parts.append(f"{series.label} {number(point[1])}")
    text, room = " · ".join(parts), chart.width - 40 - 8.5 * len(chart.title) - RIGHT
    squeeze = f' textLength="{room:.0f}" lengthAdjust="spacingAndGlyphs"' if CHARACTER * len(text) > room else ""
    return f'<text class="number" x="{chart.right}" y="24" text-anchor="end"{squeeze}>{escape(text)}</text>'


def _at(points: list[tuple[float, float]], step: float) -> tuple[float, float] | None:
    """The latest point at or before `step`."""
    index = bisect_right(points, step, key=_step_of)
    return points[index - 1] if index else None


def _step_of(point: tuple[float, float]) -> float:
    return point[0]


def _identifier(text: str) -> str:
    return "clip-" + "".join(c if c.isalnum() else "-" for c in text.lower())
