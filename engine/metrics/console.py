"""What a person watching a run sees: one line per logged step.

    step   120/1000 │ loss 3.2145 │ grad norm 1.02 │ lr 3.00e-04 │ 12.3k tokens/s │ MFU n/a (causal) │ ETA 0:04:10

On a terminal a live bar stays below the lines; in a log file there are only lines.  Where nothing can be written any
more (a closed pipe, a terminal that has gone) the console falls silent and the run goes on: `metrics.jsonl` has it all.

The time left is (steps left) × (seconds per step), where seconds per step is the wall-clock time between the first and
the latest line of *this* process: evaluation and saving count, the steps done before a resume do not, and the first
step, which compiles and allocates, is only the starting point.  The window slides, so a change of speed shows.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import IO, Any, Self, TextIO, cast

import rich.console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

ETA_WINDOW = 100            # logged steps over which the speed is averaged


class Console:
    """Prints the progress of a run; use as a context manager, or call `close`.

    Args:
        total_steps: the step at which the run is done.
        stream: where to print; standard output unless given.
        is_terminal: draw a live bar; asked of the stream unless given.
        first_step: the step the run resumed after, 0 for a fresh start.
        clock: seconds; for tests.
    """

    def __init__(self, total_steps: int, stream: TextIO | None = None, is_terminal: bool | None = None,
                 first_step: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self.total_steps = total_steps
        self._stream = _Voice(stream if stream is not None else sys.stdout)
        self._clock = clock
        self._times: deque[tuple[int, float]] = deque(maxlen=ETA_WINDOW + 1)
        self._skipped = None if first_step else 0           # a count; what it was before a resume isn't known here
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if self._stream.isatty() if is_terminal is None else is_terminal:
            self._open_bar(first_step)

    def step(self, record: Mapping[str, Any]) -> None:
        """One line for one record of `metrics.jsonl`."""
        self._times.append((record["step"], self._clock()))
        line = step_line(record, self.total_steps, self.seconds_left())
        skipped = record.get("skipped") or 0
        if self._skipped is not None and skipped > self._skipped:
            line += f" │ SKIPPED {skipped - self._skipped}: not finite, weights unchanged"
        self._skipped = skipped
        self._print(line)
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"])

    def evaluation(self, step: int, valid_loss: float) -> None:
        """One line for an evaluation."""
        perplexity = math.inf if valid_loss > 700 else math.exp(valid_loss)
        self._print(f"{_position(step, self.total_steps)} │ validation loss {valid_loss:.4f} │ "
                    f"perplexity {perplexity:.4g}", style="cyan")

    def checkpoint(self, step: int, path: object, seconds: float | None = None) -> None:
        """One line for a checkpoint; `seconds` is how long training waited for it."""
        waited = "" if seconds is None else f" │ training waited {seconds:.2f} s"
        self._print(f"{_position(step, self.total_steps)} │ saved {path}{waited}", style="green")

    def note(self, text: str) -> None:
        """A line of information."""
        self._print(text)

    def warning(self, text: str) -> None:
        """A line that should catch the eye."""
        self._print(f"warning: {text}", style="bold yellow")

    def seconds_left(self) -> float | None:
        """Estimated seconds to the last step, or None before the second line."""
        if len(self._times) < 2:
            return None
        (first_step, first), (last_step, last) = self._times[0], self._times[-1]
        if last_step <= first_step:
            return None
        return (last - first) / (last_step - first_step) * max(0, self.total_steps - last_step)

    def close(self) -> None:
        """Remove the live bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def _open_bar(self, first_step: int) -> None:
        self._bar = Progress(TextColumn("[bold]{task.completed}/{task.total}"), BarColumn(bar_width=None),
                             TextColumn("{task.percentage:>3.0f} %"), transient=True, refresh_per_second=4,
                             console=rich.console.Console(file=cast(IO[str], self._stream), force_terminal=True))
        self._task = self._bar.add_task("", total=self.total_steps, completed=first_step)
        self._bar.start()

    def _print(self, line: str, style: str = "") -> None:
        encoding = self._stream.encoding
        line = line.encode(encoding, "replace").decode(encoding)          # a log in ASCII must not end the run
        if self._bar is not None:
            self._bar.console.print(Text(line, style=style), soft_wrap=True)
        else:
            print(line, file=self._stream, flush=True)


class _Voice:
    """A text stream that falls silent where it cannot be written; the live bar's thread uses it too."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = stream.encoding or "utf-8"

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def _try(self, action: Callable[[], object]) -> None:
        """On failure the stream's file, with what is still in its buffer, goes to nowhere from now on."""
        try:
            action()
        except OSError:
            with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


def step_line(record: Mapping[str, Any], total_steps: int, seconds_left: float | None) -> str:
    """The console line of one record; what the record lacks is left out or said to be unknown."""
    parts = [_position(record["step"], total_steps), f"loss {_number(record.get('loss'), '.4f')}",
             f"grad norm {_number(record.get('grad_norm'), '.3g')}", f"lr {_number(record.get('lr'), '.2e')}",
             f"{_thousands(record.get('tokens_per_second'))} tokens/s", mfu_text(record.get("mfu")),
             f"ETA {duration(seconds_left)}"]
    return " │ ".join(parts)


def mfu_text(mfu: float | None) -> str:
    """`MFU 48.5 % (causal)`, or `MFU n/a (causal)` where the device's peak isn't known."""
    return "MFU n/a (causal)" if mfu is None else f"MFU {100 * mfu:.1f} % (causal)"


def duration(seconds: float | None) -> str:
    """`0:04:10`, `3 days, 2:00:00`; `–` where it isn't known yet."""
    return "–" if seconds is None else str(timedelta(seconds=round(seconds)))


def _position(step: int, total_steps: int) -> str:
    return f"step {step:>{len(str(total_steps))}}/{total_steps}"


def _number(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)


def _thousands(value: float | None) -> str:
    if value is None:
        return "n/a"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            divisor = {"G": 1e9, "M": 1e6, "k": 1e3}[unit]
            return f"{value / divisor:.3g}{unit}"
    return f"{value:.0f}"
