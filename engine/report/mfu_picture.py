"""Measured jobs as a picture: two bars of seconds by cause for each, what was measured and what was planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.report.plan_picture import BAR, LEFT, WIDTH, bar, in_seconds, legend
from engine.report.svg import picture, text

GAP = 22.0


def mfu_svg(title: str, jobs: Sequence[tuple[str, Mapping[str, float], Mapping[str, float] | None]]) -> str:
    """(name, measured seconds by cause, those of the plan or None) of every job."""
    causes = list(dict.fromkeys(cause for _, measured, _ in jobs for cause in measured))
    longest = max(sum(each.values()) for _, measured, planned in jobs for each in (measured, planned) if each)
    body, y = legend([cause.replace("_", " ") for cause in causes], 44), 76.0
    for name, measured, planned in jobs:
        body.append(text(LEFT, y - 5, name))
        for label, each in (("measured", measured), ("plan", planned)):
            if each is not None:
                parts = {cause: each.get(cause, 0.0) for cause in causes}
                body += [text(LEFT - 8, y + 13, label, anchor="end"), *bar(parts, WIDTH / longest, y, in_seconds)]
                y += BAR + 2
        y += GAP
    return picture(LEFT + WIDTH + 20, y, title, [text(LEFT, 20, title, "title"), *body])
