"""How far a pass over many bytes has come: a bar on a terminal, elsewhere a plain line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

SECONDS_BETWEEN_LINES = 10.0

Advance = Callable[[int], None]                                         # told the bytes done since the last call
Begin = Callable[[str, int], AbstractContextManager[Advance]]           # what is done now, and how many bytes it is


@contextmanager
def quiet(what: str, total_bytes: int) -> Iterator[Advance]:
    """Tells nobody."""
    yield lambda done: None


@contextmanager
def on_console(what: str, total_bytes: int) -> Iterator[Advance]:
    """On stderr, so that what a command prints can be piped on."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(console, what, total_bytes).advance
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
               TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total_bytes)
        yield lambda done: bar.advance(task, done)


class _Lines:
    def __init__(self, console: Console, what: str, total_bytes: int) -> None:
        self._console, self._what, self._total = console, what, total_bytes
        self._done, self._start = 0, time.monotonic()
        self._last = self._start

    def advance(self, done: int) -> None:
        self._done += done
        now = time.monotonic()
        if now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            self._console.print(f"{self._what} {100 * self._done / max(1, self._total):3.0f}%  "
                                f"{self._done / 1e9 / (now - self._start):.2f} GB/s", highlight=False)
