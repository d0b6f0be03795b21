"""How far an evaluation has come: a bar on a terminal, elsewhere a plain line now and then; both on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0

Report = Callable[[int, float], None]                        # so many are done, and the loss so far


@contextmanager
def progress(what: str, total: int, shown: bool) -> Iterator[Report]:
    """Counts to `total`; `shown` on one rank only."""
    console = Console(stderr=True)
    if not shown:
        yield lambda done, loss: None
    elif not console.is_terminal:
        yield _lines(console, what, total)
    else:
        columns = (TextColumn("loss {task.fields[loss]:.4f}"), BarColumn(), MofNCompleteColumn(), TextColumn(what),
                   TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total, loss=float("nan"))
            yield lambda done, loss: bar.update(task, completed=done, loss=loss)


def _lines(console: Console, what: str, total: int) -> Report:
    last = time.monotonic()

    def report(done: int, loss: float) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            console.print(f"{done}/{total} {what}, loss so far {loss:.4f}", highlight=False)

    return report
