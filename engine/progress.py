"""How far a long piece of work has come; every command shows it in this form.

    writing  37 %  1.2 of 3.2 GB  412.0 MB/s  0:00:05 left

On a terminal with a bar in it, elsewhere (a log file, a pipe) as a plain line every ten seconds; on stderr, so that
what a command prints can be piped on.  Speed and time left count from the first report on: what an earlier process had
done, and what came before the work itself, is nobody's speed now.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import IO, NamedTuple, Self

import rich.console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_NOTES = 1.0
WIDTH = 80
BYTES = "bytes"
BYTE_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))

Advance = Callable[[int], None]                                 # told what was done since the last call


class _Mark(NamedTuple):
    seconds: float
    done: int
    worked: int


class Progress:
    """Use as a context manager, and report from any thread.

    Args:
        what: a word: what is done now.
        total: how much there is to do; 0 where nobody knows.
        unit: of it: `BYTES`, or a plural such as `windows`.
        shown: whether anybody is told; a command that runs on several ranks tells on one.
        stream: where to show it; standard error unless given.
        is_terminal: draw a bar; asked of the stream unless given.
        clock: seconds; for tests.
    """

    def __init__(self, what: str, total: int, unit: str = BYTES, shown: bool = True, stream: IO[str] | None = None,
                 is_terminal: bool | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._total, self._unit, self._shown, self._clock = what, total, unit, shown, clock
        self._console = rich.console.Console(file=stream or sys.stderr, force_terminal=is_terminal)
        columns = TextColumn("{task.fields[share]}"), BarColumn(bar_width=None), TextColumn("{task.fields[state]}")
        self._bar = Bar(*columns, console=self._console, transient=True, refresh_per_second=4, expand=True,
                        redirect_stdout=sys.stdout is not None and sys.stdout.isatty())     # what is piped on stays
        self._task = self._bar.add_task(what, total=total or None, share=what, state="")
        self._first: _Mark | None = None
        self._now = _Mark(clock(), 0, 0)
        self._next_line = self._now.seconds + SECONDS_BETWEEN_LINES
        self._note, self._next_note = "", self._now.seconds
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        if self._shown and self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def advance(self, amount: int) -> None:
        """So much more is done."""
        with self._lock:
            self._report(self._now.done + amount, amount, None)

    def reach(self, done: int, worked: int | None = None, note: Callable[[], str] | None = None) -> None:
        """So much is done in all.

        Args:
            worked: what the speed counts since the last call, where that is something else: text of packed files.
            note: says what else there is, such as the loss so far; asked at most once a second, and only where it is
                shown, for it may have to wait for a device.
        """
        with self._lock:
            self._report(done, done - self._now.done if worked is None else worked, note)

    def print(self, line: str, style: str = "") -> None:
        """A line above the bar."""
        self._console.print(Text(line, style=style), soft_wrap=True)

    def _report(self, done: int, worked: int, note: Callable[[], str] | None) -> None:
        if not self._shown:
            return
        self._now = _Mark(self._clock(), done, self._now.worked + worked)
        self._first = self._first or self._now
        if not self._console.is_terminal and self._now.seconds < self._next_line:
            return
        if note is not None and self._now.seconds >= self._next_note:
            self._note, self._next_note = note(), self._now.seconds + SECONDS_BETWEEN_NOTES
        share = self._what + (f" {100 * done / self._total:3.0f} %" if self._total else "")
        parts = [part for part in (self._amount(), *self._speed(), self._note, self._left()) if part]
        fits = len("  ".join((share, *parts))) <= WIDTH or not self._total
        state = "  ".join(parts if fits else parts[1:])                 # the share says it too
        if self._console.is_terminal:
            self._bar.update(self._task, completed=done, share=share, state=state)
        else:
            self._next_line = self._now.seconds + SECONDS_BETWEEN_LINES
            self._console.print(f"{share}  {state}", highlight=False, soft_wrap=True)

    def _amount(self) -> str:
        of = f" of {_scaled(self._total, self._unit)}" if self._total else f" {_unit(self._now.done, self._unit)}"
        return _scaled(self._now.done, self._unit, self._total or self._now.done, False) + of

    def _speed(self) -> tuple[str, ...]:
        """Nothing before the second report."""
        assert self._first is not None
        seconds = self._now.seconds - self._first.seconds
        if seconds <= 0:
            return ()
        per_second = (self._now.worked - self._first.worked) / seconds
        return (f"{_scaled(per_second, BYTES)}/s" if self._unit == BYTES else f"{thousands(per_second)}/s",)

    def _left(self) -> str:
        assert self._first is not None
        done, seconds = self._now.done - self._first.done, self._now.seconds - self._first.seconds
        if done <= 0 or not self._total:
            return ""
        return f"{duration(max(0, self._total - self._now.done) * seconds / done)} left"


Begin = Callable[[str, int], Progress]                          # what is done now, and how many bytes that is
quiet: Begin = partial(Progress, shown=False)


def _unit(amount: float, unit: str) -> str:
    """`GB` for many bytes."""
    return next((name for size, name in BYTE_UNITS if amount >= size), "B") if unit == BYTES else unit


def _scaled(amount: float, unit: str, like: float | None = None, named: bool = True) -> str:
    """`1.2 GB`, `1,024 windows`; in the unit that suits `like`, with its name or without."""
    name = _unit(amount if like is None else like, unit)
    size = next((size for size, its in BYTE_UNITS if its == name), 1)
    return f"{amount / size:,.{1 if size > 1 else 0}f}" + (f" {name}" if named else "")


def thousands(value: float) -> str:
    """`3.1`, `812`, `9999`, `12.3k`, `778k`, `1.50M`."""
    for divisor, limit, unit in ((1e9, 999.5e6, "G"), (1e6, 999.5e3, "M"), (1e3, 9999.5, "k")):
        if value >= limit:
            number = value / divisor
            return f"{number:.{2 if number < 9.995 else 1 if number < 99.95 else 0}f}{unit}"
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def duration(seconds: float) -> str:
    """`0:04:10`, `23h 59m`, `20d 19h`, `120d`: at most seven characters up to a hundred years."""
    minutes, left = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours < 10:
        return f"{hours}:{minute:02}:{left:02}"
    if hours < 100:
        return f"{hours}h {minute:02}m"
    days, hour = divmod(hours, 24)
    return f"{days}d {hour:02}h" if days < 100 else f"{days}d"
