"""How far a long pass over files has come: share of the input read, MB/s of text, time left.

A bar on a terminal; elsewhere (a log file) a plain line now and then.  The share counts bytes of the files as they lie
on disk, the speed counts text, which for compressed files is more.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from corpus_tools.inputs import InputFile

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A context manager; call `update` as blocks of the files are done."""

    def __init__(self, files: Sequence[InputFile]) -> None:
        self._before = [0, *accumulate(file.num_bytes for file in files)]  # bytes of all files before this one
        self._console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("{task.percentage:>3.0f}%"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            console=self._console,
        )
        self._task = self._bar.add_task("", total=max(1, self._before[-1]), state="starting")
        self._text_bytes = 0
        self._done_at_start: int | None = None
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def update(self, file_index: int, file_position: int, text_bytes: int) -> None:
        """`text_bytes` more were done; the reader stands at byte `file_position` of file `file_index`."""
        done = self._before[file_index] + file_position
        if self._done_at_start is None:
            self._done_at_start = done  # a resumed run must not count what was kept as its own speed
        self._text_bytes += text_bytes
        now = time.monotonic()
        state = self._state(done, now - self._start)
        if self._console.is_terminal:
            self._bar.update(self._task, completed=done, state=state)
        elif now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._console.print(f"{100 * done / max(1, self._before[-1]):3.0f}%  {state}", highlight=False)

    def _state(self, done: int, seconds: float) -> str:
        speed = f"{self._text_bytes / 1e6:,.0f} MB  {self._text_bytes / 1e6 / max(seconds, 1e-9):,.1f} MB/s"
        read = done - (self._done_at_start or 0)
        if read <= 0:
            return speed
        left = (self._before[-1] - done) * seconds / read
        return f"{speed}  {int(left // 3600)}:{int(left // 60 % 60):02d}:{int(left % 60):02d} left"
