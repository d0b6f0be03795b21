"""Several planned jobs beside each other, as text: a search's layouts, or one job on more and more devices."""

from __future__ import annotations

from collections.abc import Sequence

from engine.plan.job import Planned
from engine.plan.search import Found, words
from engine.plan.text import duration, memory_size, table


def scaling_table(jobs: Sequence[Planned]) -> str:
    """One line for each number of devices; efficiency is against the first, by tokens per second and device."""
    rows = [("devices", "layout", "fits", "step", "tokens/s", "MFU", "efficiency", "days", "device-hours")]
    base = jobs[0].time.tokens_per_second / jobs[0].world
    for job in jobs:
        time = job.time
        rows.append((f"{job.world:,}", words(job.config), "yes" if job.fits else "NO", duration(time.seconds),
                     f"{time.tokens_per_second:,.0f}", f"{time.mfu:.1%}",
                     f"{time.tokens_per_second / job.world / base:.1%}", f"{job.days:,.3g}",
                     f"{job.days * 24 * job.world:,.0f}"))
    return "\n".join(table(rows, right=(0, 3, 4, 5, 6, 7, 8)))


def search_table(found: Found, half: Planned | None) -> str:
    """The layouts that a search has found, why the second is not the first, and what was faster and does not fit."""
    best = found.best[0]
    rows = [("", "layout", "step", "MFU", "memory", "bubble", "days")]
    for place, job in enumerate(found.best, start=1):
        rows.append((str(place), words(job.config), duration(job.time.seconds), f"{job.time.mfu:.1%}",
                     memory_size(job.fullest.needed), f"{job.time.bubble:.1%}", f"{job.days:,.3g}"))
    lines = [f"{best.config.model.num_layers} layers on {best.world:,} × {best.device.name}: {found.tried:,} layouts, "
             f"the fastest that fit {memory_size(best.device.memory)} (times ± {best.error:.0%})", ""]
    lines += [f"  {line.rstrip()}" for line in table(rows, right=(0, 2, 3, 4, 5, 6))]
    lost = found.why_the_second_lost()
    lines += ["", f"The second is {lost}."] if lost is not None else []
    if found.excluded:
        lines += ["", "Faster, but too large:"]
        lines += [f"  {words(each.config)}: {each.why}" for each in found.excluded[:5]]
    if half is not None:
        lines += ["", f"With half the memory: {words(half.config)}, {duration(half.time.seconds)} a step "
                      f"({half.time.seconds / best.time.seconds - 1:+.1%})"]
    else:
        lines += ["", "With half the memory nothing fits."]
    return "\n".join(lines)
