"""A watchdog: a rank that does not get on ends the job in seconds, not after the collectives' ten minutes.

A thread of each rank looks how long its phase has lasted (`engine.metrics.phases`).  What is too long is learned from
the run: so many times the median of its steps, but never less than a minimum; before the first step is done, in a save
and in an evaluation there are limits of their own.

One rank hangs, and all hang: its peers wait for it in a collective.  So that a person sees one line and not thousands,
each rank whose limit is up leaves where it stands in the run's folder, next to its log, which gets the stacks of all
its threads.  A moment later the first of those who could speak puts the reports side by side:

    a rank that left no report     cannot run at all: frozen, or its machine is gone
    a rank that waits for nobody   is the one, and where it stands says what for
    all wait for one another       at different places: their programs disagree; at the same: the network

Then all end, hard, with an exit code of their own, so that whoever started them may start them again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import linecache
import os
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.config import WatchdogConfig
from engine.config.phases import KINDS
from engine.distributed.last_words import write_down
from engine.errors import OctantError
from engine.metrics.events import append_event
from engine.metrics.phases import BETWEEN, Moment, Phases

HUNG = 5                                   # exit code
LOOK_SECONDS = 0.25                        # between two looks at how long a phase has lasted
PATIENCE_SECONDS = 3.0                     # between a rank's own report and the verdict
NUM_JUDGES = 8                             # at least: ranks that put reports side by side
IN_STEP = (*(name for kind in KINDS for name in kind.in_step), BETWEEN)
FIRST, LAST = {kind.in_step[0] for kind in KINDS}, {kind.in_step[-1] for kind in KINDS}
OUR_FILES = f"{os.sep}engine{os.sep}"
WAITING_FILES = (os.path.join("torch", "distributed"), os.path.join("engine", "distributed"))
WAITING_CALLS = (".wait(", ".join(", ".synchronize(", ".item()", ".tolist()")


class Hung(OctantError):
    """A rank did not get on."""

    exit_code = HUNG


@dataclass(frozen=True)
class Report:
    """Where a rank stands.

    Attributes:
        seconds, limit: how long its phase has lasted, and might have.
        where: the innermost of our functions that its main thread is in.
        waits: for other ranks, as far as one can see.
    """

    rank: int
    host: str
    step: int
    phase: str
    seconds: float
    limit: float
    where: str
    waits: bool


class Watchdog:
    """Watches one rank from `start` to `close`.  It also listens to the phases, to learn how long they take.

    Args:
        phases: of the rank that it is created in, by the thread to be watched.
        directory: the run's folder; reports go into its `logs/`.
        end: ends the process.
    """

    def __init__(self, config: WatchdogConfig, phases: Phases, rank: int, world_size: int, directory: Path,
                 end: Callable[[int], object] = os._exit) -> None:
        self._config, self._phases, self._rank, self._world_size = config, phases, rank, world_size
        self._logs, self._directory, self._end = directory / "logs", directory, end
        self._main = threading.get_ident()
        self._closed = threading.Event()
        self._steps: deque[float] = deque(maxlen=32)
        self._longest: dict[str, float] = {}
        self._before: Moment | None = None
        self._step_began = 0.0

    def start(self) -> None:
        """Begins to watch."""
        for kind in ("hang", "verdict"):
            with contextlib.suppress(OSError):
                self._path(self._rank, kind).unlink()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def close(self) -> None:
        """Watches no longer."""
        self._closed.set()

    def __call__(self, moment: Moment) -> None:
        """Learns how long the phase before took, or the step."""
        before, self._before = self._before, moment
        if before is not None and before.phase not in IN_STEP:
            self._longest[before.phase] = max(self._longest.get(before.phase, 0.0), moment.since - before.since)
        if before is not None and before.phase in LAST:
            self._steps.append(moment.since - self._step_began)
        if moment.phase in FIRST:
            self._step_began = moment.since

    def limit(self, phase: str) -> float:
        """Seconds that a phase may last."""
        config = self._config
        if not self._steps:
            return config.start_seconds
        if phase == "save":
            return config.save_seconds
        if phase not in IN_STEP:
            known = self._longest.get(phase)
            return config.start_seconds if known is None else max(config.min_seconds, config.step_factor * known)
        return max(config.min_seconds, config.step_factor * statistics.median(self._steps))

    def _watch(self) -> None:
        while not self._closed.wait(min(LOOK_SECONDS, self._config.min_seconds / 4)):
            now = self._phases.now
            seconds, limit = time.perf_counter() - now.since, self.limit(now.phase)
            if seconds > limit and self._phases.now is now:
                self._raise_alarm(now, seconds, limit)
                return

    def _raise_alarm(self, now: Moment, seconds: float, limit: float) -> None:
        where, waits = position(self._main)
        report = Report(self._rank, socket.gethostname(), now.step, now.phase, round(seconds, 1), round(limit, 1),
                        where, waits)
        with contextlib.suppress(OSError):
            self._logs.mkdir(parents=True, exist_ok=True)
            write_beside(self._path(self._rank, "hang"), json.dumps(asdict(report)))
        with contextlib.suppress(OSError, ValueError, AttributeError):
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        line = self._agree(report)
        write_down(self._directory, self._rank, Hung(line), HUNG)
        with contextlib.suppress(OSError, ValueError):
            print(f"{time.strftime('%H:%M:%S')} rank {self._rank}: {line}", file=sys.stderr, flush=True)
        self._end(HUNG)

    def _agree(self, mine: Report) -> str:
        """The line that says it, put together by the first judge that could report and read by the others.

        Judges are a few ranks on different machines: thousands that list a folder of thousands of reports, again and
        again, would be a fault of their own.
        """
        judges = range(0, self._world_size, max(1, self._world_size // NUM_JUDGES))
        patience = PATIENCE_SECONDS
        if self._rank in judges:
            deadline = time.monotonic() + PATIENCE_SECONDS
            while len(names := self._reported()) < self._world_size and time.monotonic() < deadline:
                time.sleep(0.1)
            if min((rank for rank in names if rank in judges), default=self._rank) == self._rank:
                line = verdict(self._reports(names) | {mine.rank: mine}, self._world_size)
                with contextlib.suppress(OSError):
                    write_beside(self._path(self._rank, "verdict"), line)
                    append_event(self._directory, "hang", mine.step, {"what": line, "phase": mine.phase}, self._rank)
                return line
        else:
            patience *= 2
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            for rank in judges:
                with contextlib.suppress(OSError):
                    return self._path(rank, "verdict").read_text(encoding="utf-8")
            time.sleep(0.25)
        return verdict({mine.rank: mine}, self._world_size)

    def _path(self, rank: int, kind: str) -> Path:
        return self._logs / f"rank-{rank:05d}.{kind}"

    def _reported(self) -> list[int]:
        """Ranks that have left a report of this hang: those of an earlier one were removed by their ranks."""
        with contextlib.suppress(OSError):
            return sorted(int(path.stem[5:]) for path in self._logs.glob("rank-?????.hang"))
        return []

    def _reports(self, ranks: list[int]) -> dict[int, Report]:
        found = {}
        for rank in ranks:
            with contextlib.suppress(OSError, ValueError, TypeError):
                found[rank] = Report(**json.loads(self._path(rank, "hang").read_text(encoding="utf-8")))
        return found


@contextlib.contextmanager
def watched(config: WatchdogConfig | None, phases: Phases, rank: int, world_size: int,
            directory: Path) -> Iterator[None]:
    """Within it the rank is watched, unless `config` is None."""
    if config is None:
        yield
        return
    watchdog = Watchdog(config, phases, rank, world_size, directory)
    phases.listeners.append(watchdog)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.close()


def verdict(reports: Mapping[int, Report], world_size: int) -> str:
    """One line: root rank, cause, call site, and who only followed."""
    silent = [rank for rank in range(world_size) if rank not in reports]
    busy = sorted((report for report in reports.values() if not report.waits),
                  key=lambda report: (report.step, IN_STEP.index(report.phase) if report.phase in IN_STEP else 99))
    some = reports[min(reports)]
    over = f"{some.phase} of step {some.step} took more than {some.limit:g} s"
    if silent and (not busy or len(silent) < world_size):
        return (f"{over}: rank{'s' * (len(silent) > 1)} {_few(silent)} cannot even report: frozen, or the machine is "
                f"gone (cause: hardware){_followed(list(reports))}")
    if busy:
        root = busy[0]
        return (f"{over}: rank {root.rank} on {root.host} stands at {root.where} (cause: {_cause(root)})"
                f"{_followed([rank for rank in reports if rank != root.rank])}")
    places = {(report.step, report.phase, report.where) for report in reports.values()}
    if some.phase == "save":
        return f"{over}: all ranks wait for a save to be written (cause: file system)"
    if len(places) > 1:
        groups = "; ".join(f"rank {report.rank} at {report.where}" for report in list(reports.values())[:4])
        return f"{over}: all ranks wait, at different places (cause: code): {groups}"
    return f"{over}: all ranks wait for one another at {some.where} (cause: network)"


def _cause(report: Report) -> str:
    table = {"engine/data/": "data", "train/batches": "data", "engine/checkpoint/": "file system",
             "engine/reliability/inject": "asked for"}
    return next((cause for place, cause in table.items() if place in report.where), "code")


def _followed(ranks: list[int]) -> str:
    return f"; rank{'s' * (len(ranks) > 1)} {_few(sorted(ranks))} only waited" if ranks else ""


def _few(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def position(thread: int) -> tuple[str, bool]:
    """`engine/data/indexed.py:88 tokens`, the innermost of our frames; and whether it waits for other ranks there."""
    where, waits = "code that is not ours", False
    for file, line, name in _frames(thread):
        waits = waits or any(place in file for place in WAITING_FILES)
        if OUR_FILES in file:
            inside = file[file.rindex(OUR_FILES) + 1 :]
            called = any(call in linecache.getline(file, line) for call in WAITING_CALLS)
            return f"{inside}:{line} {name}", waits or (called and "engine/reliability/" not in inside)
    return where, waits


def _frames(thread: int) -> Iterator[tuple[str, int, str]]:
    """File, line and function of a thread's frames, the innermost first."""
    frame = sys._current_frames().get(thread)
    if frame is not None:
        for entry in reversed(traceback.extract_stack(frame, limit=64)):
            yield entry.filename, entry.lineno or 0, entry.name


def write_beside(path: Path, text: str) -> None:
    """A small file that is whole as soon as it has its name."""
    beside = path.with_suffix(".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
