"""The parts that every picture is made of: elements, text, axes with round numbers, and one style.

A picture is text, written without a plotting library or a script.  Whatever goes into it is escaped here and nowhere
else, and coordinates keep two digits.  Colours are CSS variables that follow the reader's light or dark setting, in a
browser as in a file of its own (`standalone`); a page that holds several pictures has `STYLE` once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

CHARACTER = 6.4                                 # width of an average character, pixels
NUM_COLORS = 6

STYLE = """
svg.chart, svg.schedule { --ink: #1c2430; --muted: #667085; --grid: #e6e9ef; --idle: #f4f6f9; --paper: #ffffff;
  --alert: #d92d20; --c0: #2563eb; --c1: #d97706; --c2: #0d9488; --c3: #9333ea; --c4: #db2777; --c5: #64748b;
  font: 12px system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; font-variant-numeric: tabular-nums; }
@media (prefers-color-scheme: dark) { svg.chart, svg.schedule { --ink: #e6eaf2; --muted: #94a0b4; --grid: #2a3342;
  --idle: #1e2633; --paper: #161c27; --alert: #f97066;
  --c0: #6ea8fe; --c1: #fbb040; --c2: #2dd4bf; --c3: #c084fc; --c4: #f472b6; --c5: #94a3b8; } }
svg text { fill: var(--muted); }
svg .title { fill: var(--ink); font-size: 14px; font-weight: 600; }
svg .number { fill: var(--ink); }
svg .grid { stroke: var(--grid); stroke-width: 1; }
svg.chart .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg.chart .faint { fill: none; stroke-width: 1; stroke-linejoin: round; opacity: .38; }
svg.chart .dashed { fill: none; stroke-width: 1.5; stroke-dasharray: 5 3; }
svg.chart .dot { stroke: var(--paper); stroke-width: 1; }
svg.chart .change { stroke: var(--c3); stroke-width: 1; stroke-dasharray: 4 3; }
svg.chart .mark { stroke: var(--alert); stroke-width: 1.5; }
svg.chart .tip rect { fill: transparent; }
svg.chart .tip :not(rect) { visibility: hidden; }
svg.chart .tip:hover :not(rect) { visibility: visible; }
svg.chart .tips:hover + .last { visibility: hidden; }
svg.chart .hair { stroke: var(--muted); stroke-width: 1; stroke-dasharray: 2 2; }
svg.schedule .idle { fill: var(--idle); }
svg.schedule .bar { stroke: #1c2430; stroke-opacity: .25; stroke-width: .5; }
svg.schedule .number { fill: #1c2430; font-size: 11px; }
"""

Attribute = str | float
Anchor = Literal["start", "middle", "end"]


def element(name: str, *children: str, **attributes: Attribute) -> str:
    """`<name …>children</name>`; of an attribute's name `class_` is `class` and `text_anchor` `text-anchor`.

    Args:
        children: finished elements, or text that `escape` has seen.
        attributes: escaped here; an empty text leaves it out.
    """
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"' for key, value in attributes.items()
                      if value != "")
    return f"<{name}{written}>{''.join(children)}</{name}>" if children else f"<{name}{written}/>"


def _value(value: Attribute) -> str:
    """Numbers with at most two digits behind the point."""
    if isinstance(value, str):
        return escape(value)
    return f"{round(value, 2) + 0.0:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def text(x: float, y: float, words: str, kind: str = "", anchor: Anchor = "start", **attributes: Attribute) -> str:
    """Words on a line at `y`, of the class `kind`."""
    return element("text", escape(words), class_=kind, x=x, y=y, text_anchor="" if anchor == "start" else anchor,
                   **attributes)


def rect(x: float, y: float, width: float, height: float, kind: str = "", **attributes: Attribute) -> str:
    """A rectangle of the class `kind`."""
    return element("rect", class_=kind, x=x, y=y, width=width, height=height, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, kind: str, **attributes: Attribute) -> str:
    """A line of the class `kind`."""
    return element("line", class_=kind, x1=x1, y1=y1, x2=x2, y2=y2, **attributes)


def dot(x: float, y: float, radius: float, color: int) -> str:
    """A point of a series."""
    return element("circle", class_="dot", style=f"fill:{color_of(color)}", cx=x, cy=y, r=radius)


def group(*children: str, kind: str = "", hint: str = "", **attributes: Attribute) -> str:
    """Elements together; `hint` is shown when one points at them."""
    return element("g", *([element("title", escape(hint))] if hint else []), *children, class_=kind, **attributes)


def color_of(index: int) -> str:
    """The colour of the series, or the stage, of that number."""
    return f"var(--c{index % NUM_COLORS})"


def picture(width: float, height: float, title: str, body: Sequence[str], kind: str = "chart",
            scales: bool = True) -> str:
    """An `<svg>` element for a page that has `STYLE`; it scales with its place, or has its size in pixels."""
    size: dict[str, Attribute] = {} if scales else {"width": width, "height": height}
    return element("svg", *body, class_=kind, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width} {height}",
                   **size, role="img", aria_label=title) + "\n"


def standalone(drawn: str) -> str:
    """A picture as a file of its own: with its style and background."""
    return drawn.replace(">", f"><style>{STYLE}svg {{ background: var(--paper) }}</style>", 1)


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

    def ticks(self, count: float) -> list[float]:
        """Round numbers on the axis, about `count` of them."""
        ticks = _log_ticks(self.low, self.high) if self.log else []
        return ticks if len(ticks) >= 3 else round_ticks(self.low, self.high, count)


def round_ticks(low: float, high: float, count: float, factors: Sequence[float] = (1, 2, 2.5, 5)) -> list[float]:
    """Multiples of one of the factors times a power of ten inside [low, high]: at most about `count`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (*factors, 10) if factor * power >= rough * (1 - 1e-9))
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
