"""Where the time of a run went, over all its starts: how much of it became steps that count.

    step         in steps, but for
    load           waiting for samples, and
    waiting        waiting for other ranks (`engine.distributed.waits`; the mean over ranks)
    save, evaluation   standing still for these
    start        from the first process to the first step; likewise after an orderly stop
    restart      from the last record of an attempt that failed to the next one's first step: what went unseen, too
    lost         steps that had to be done again
    other        between these

    goodput = (step + load + waiting) / all

Every record of `metrics.jsonl` holds the sums so far, and the time.  A start reads the last one before it drops what
lies behind its checkpoint: so a run that is killed at any moment has lost at most the account of the steps since its
latest record.  Between an orderly stop and the next start the run is nobody's; that time is not counted.

Durations come from a clock that does not jump.  Between processes there is only the time of day; what goes backwards
there counts as nothing.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.metrics.events import read_events
from engine.metrics.phases import Taken
from engine.metrics.sinks import METRICS_FILE
from engine.progress import duration

IN_STEPS = ("step", "load", "waiting")                       # what counts, where the step is kept
CAUSES = (*IN_STEPS, "save", "evaluation", "start", "restart", "lost", "other")
PREFIX = "goodput_s/"                                        # of the sums' names in a record

Seconds = dict[str, float]


@dataclass
class Goodput:
    """The account of a run, kept by rank 0.

    Attributes:
        seconds: by cause.
        at: time of day, in seconds, up to which it goes.
        first: what the time up to the next record is called, but for what is known of it.
    """

    seconds: Seconds = field(default_factory=lambda: dict.fromkeys(CAUSES, 0.0))
    at: float = field(default_factory=time.time)
    first: str = "start"

    def __post_init__(self) -> None:
        self._offset = time.time() - time.perf_counter()

    @staticmethod
    def going_on(directory: Path, step: int) -> Goodput:
        """That of a run's folder, whose run goes on from `step`; to be read before later records are dropped."""
        records = list(_records(directory / METRICS_FILE))
        ends = [event for event in read_events(directory)
                if event.kind == "end" and isinstance(event.detail.get("goodput"), dict)]
        last = records[-1] if records else None
        orderly = bool(ends) and (last is None or ends[-1].time.timestamp() + 1 >= last["time"])
        if orderly:
            last = ends[-1].detail["goodput"] | {"step": ends[-1].step}
        if last is None:
            return Goodput(at=began())
        seconds, at = _sums(last), last["time"]
        if last["step"] > step:
            kept = next((each for each in reversed(records) if each["step"] <= step), {"step": 0})
            share = (last["step"] - step) / (last["step"] - kept["step"])
            for cause in IN_STEPS:
                gone = max(0.0, share * (seconds[cause] - _sums(kept)[cause]))
                seconds[cause] -= gone
                seconds["lost"] += gone
        return Goodput(seconds, max(at, began()) if orderly else at, "start" if orderly else "restart")

    def record(self, taken: Taken, waiting: float, between: float = 0.0) -> dict[str, float]:
        """Takes in what has happened since the last call, and tells the sums.

        Args:
            taken: by this rank's steps and phases since then.
            waiting: seconds of these steps in which ranks waited for each other.
            between: seconds in which they did so after a step.
        """
        now = self._offset + time.perf_counter()
        load = taken.by_phase.get("load", 0.0)
        waiting = min(waiting, max(0.0, taken.in_steps - load))
        more = {"load": load, "waiting": waiting + between, "step": taken.in_steps - load - waiting,
                "save": taken.by_phase.get("save", 0.0), "evaluation": taken.by_phase.get("evaluate", 0.0)}
        for cause, seconds in more.items():
            self.seconds[cause] += seconds
        self.seconds[self.first] += max(0.0, now - self.at - sum(more.values()))
        self.at, self.first = now, "other"
        return {"time": now, "goodput": self.fraction} | {PREFIX + cause: self.seconds[cause] for cause in CAUSES}

    @property
    def fraction(self) -> float:
        """Of all time, that in steps which count."""
        return fraction(self.seconds)

    def text(self) -> str:
        """`goodput 93.1 % of 0:10:12: step 0:08:20, …`, the largest first, without what is nothing."""
        return text(self.seconds)


def fraction(seconds: Mapping[str, float]) -> float:
    """The goodput of an account."""
    return sum(seconds[cause] for cause in IN_STEPS) / max(1e-9, sum(seconds.values()))


def text(seconds: Mapping[str, float]) -> str:
    """An account in a line; see `Goodput.text`."""
    total = sum(seconds.values())
    causes = sorted((cause for cause in CAUSES if seconds[cause] >= total / 1000), key=lambda cause: -seconds[cause])
    return f"goodput {fraction(seconds):.1%} of {duration(total)}: " + ", ".join(
        f"{cause} {seconds[cause] / max(1e-9, total):.1%}" for cause in causes)


def account(record: Mapping[str, Any]) -> Seconds | None:
    """The sums of a record of `metrics.jsonl`; None: it has none."""
    return _sums(record) if "goodput" in record else None


def _sums(record: Mapping[str, Any]) -> Seconds:
    return {cause: float(record.get(PREFIX + cause) or 0.0) for cause in CAUSES}


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Those that hold an account."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            found = json.loads(line)
            if isinstance(found["step"], int) and isinstance(found["time"], float):
                yield found
        except (ValueError, KeyError, TypeError):
            continue


def began() -> float:
    """Time of day at which this process was started; where the system does not say, now."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        age = 0.0
    return time.time() - age
