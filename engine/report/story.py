"""What happened to a run, from its `events.jsonl`: starts, changes, skips, spikes, saves, ways back, ends.

A start without an end before it says that the process was gone without a word: killed, or out of memory.  Saves, and
steps that were skipped, one like the other, share a line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from engine.metrics.events import Event
from engine.reading import shown

MANY = ("save", "skip", "too_large")           # kinds whose events one behind the other are told together
CHANGED = "changed"                            # the kind of what a resumed run does otherwise than before


def story(events: Sequence[Event], together: bool = True) -> Iterator[str]:
    """A line for each event, or for several alike.

    Args:
        together: tell saves in a row, and skips in a row, in one line.
    """
    before: Event | None = None
    for _, group in groupby(enumerate(events), key=lambda each: each[1].kind if together and each[1].kind in MANY
                            else each[0]):
        alike = [event for _, event in group]
        first, last = alike[0], alike[-1]
        if first.kind == "start" and before is not None and before.kind not in ("end", "rewind", CHANGED):
            yield _line(first, "the process before was gone without a word")
        yield _line(first, _words(alike), last)
        before = last


def _line(event: Event, words: str, last: Event | None = None) -> str:
    steps = f"{event.step:,}" if last is None or last.step == event.step else f"{event.step:,}–{last.step:,}"
    rank = f" (rank {event.rank})" if event.rank else ""
    return f"{event.time:%Y-%m-%d %H:%M:%S}  step {steps:>9}  {words}{rank}"


def _words(alike: Sequence[Event]) -> str:
    kind, detail, number = alike[0].kind, alike[0].detail, len(alike)
    if kind == "save":
        return "saved" if number == 1 else f"saved {number} times"
    if kind in ("skip", "too_large"):
        steps = sum(_number(event.detail.get("steps")) for event in alike)
        why = ": the gradient's norm was above reliability.max_grad_norm" if kind == "too_large" else ""
        return f"{steps} step{'s' * (steps != 1)} changed nothing{why}"
    return WORDS[kind](alike[0].step, detail) if kind in WORDS else f"{kind}: {_listed(detail)}"


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 1


def _start(step: int, detail: Mapping[str, Any]) -> str:
    processes, commit = detail.get("processes"), detail.get("commit")
    return (f"{'continued' if step else 'began'} on {detail.get('host')}: {processes} process"
            f"{'es' * (processes != 1)}, {detail.get('device')}, octant {detail.get('octant')}"
            + (f" ({shown(commit)[1:9]})" if isinstance(commit, str) else ""))


def _rewind(step: int, detail: Mapping[str, Any]) -> str:
    samples = ""
    match detail.get("skip"):
        case [int(first), int(stop)]:
            samples = f"; samples {first:,} to {stop - 1:,} are left out"
    return f"went back to step {detail.get('to_step')} ({detail.get('why')}){samples}"


def changes(detail: Mapping[str, Any]) -> str:
    """`optim.lr 0.0003 → 0.000225; optim.grad_clip 1.5 → 0.3`."""
    pairs = {key: pair for key, pair in detail.items() if isinstance(pair, list) and len(pair) == 2}
    return "; ".join(f"{key} {shown(old)} → {shown(new)}" for key, (old, new) in pairs.items())


def _listed(detail: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {shown(value)}" for key, value in detail.items())


WORDS: dict[str, Callable[[int, Mapping[str, Any]], str]] = {
    "start": _start, "rewind": _rewind, CHANGED: lambda _, detail: f"changed: {changes(detail)}",
    "end": lambda _, detail: "finished" if detail.get("finished") else "stopped on request, saved",
    "spike": lambda _, detail: f"spike: {detail.get('z')} robust standard deviations ({detail.get('action')})",
    "hang": lambda _, detail: f"hung: {detail.get('what')}",
}
