"""A planned job as a picture: what fills the memory of every stage, and where the time of a step goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from engine.report.svg import color_of, group, line, picture, rect, text

LEFT, WIDTH, BAR, GAP = 90.0, 620.0, 18.0, 8.0


def plan_svg(layout: str, memory: Sequence[Mapping[str, float]], limit: float, times: Mapping[str, float]) -> str:
    """Bars of bytes by stage, with the device's memory as a line, and one bar of seconds by cause."""
    body = [text(LEFT, 44, "memory of a rank, GiB, by pipeline stage")]
    scale = WIDTH / max(limit * 1.02, *(sum(stage.values()) for stage in memory))
    y = 56.0
    for number, stage in enumerate(memory):
        body += [text(LEFT - 8, y + 13, f"stage {number}", anchor="end"), *bar(stage, scale, y, in_gib)]
        y += BAR + GAP
    body.append(line(LEFT + limit * scale, 50, LEFT + limit * scale, y, "mark"))
    body += legend(list(memory[0]), y + 14)
    y += 52
    body.append(text(LEFT, y - 8, "time of a step, seconds, by cause"))
    total = sum(times.values())
    body += [text(LEFT - 8, y + 13, "step", anchor="end"), *bar(times, WIDTH / total, y, in_seconds)]
    body += legend([name.replace("_", " ") for name in times], y + BAR + 18)
    return picture(LEFT + WIDTH + 20, y + BAR + 34, layout, [text(LEFT, 20, layout, "title"), *body])


def bar(parts: Mapping[str, float], scale: float, y: float, label: Callable[[float], str]) -> list[str]:
    """Parts one behind the other, each named with its size where one points at it."""
    x, out = LEFT, []
    for index, (name, size) in enumerate(parts.items()):
        shown = f"{name.replace('_', ' ')}: {label(size)}"
        out.append(group(rect(x, y, size * scale, BAR, fill=color_of(index)), hint=shown))
        x += size * scale
    return out


def legend(names: Sequence[str], y: float) -> list[str]:
    """The colours of the parts."""
    x, out = LEFT, []
    for index, name in enumerate(names):
        out += [rect(x, y - 9, 10, 10, fill=color_of(index)), text(x + 14, y, name)]
        x += 30 + 6.6 * len(name)
    return out


def in_gib(num_bytes: float) -> str:
    """`2.50 GiB`."""
    return f"{num_bytes / 2**30:.2f} GiB"


def in_seconds(seconds: float) -> str:
    """`2.5 s`."""
    return f"{seconds:.3g} s"
