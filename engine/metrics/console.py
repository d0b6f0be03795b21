"""What a person watching a run sees: one line per logged step.

    step    120  loss 3.2145  norm 1.023  lr 3.0e-4  12.3k tok/s  MFU 48.5%  0:04:10

Every number has a column of fixed width, and all columns fit into 80.  What never changes is said once, before the
first of these lines: which FLOPs the MFU counts, or that there is none.  On a terminal a live bar stays below the
lines; in a log file there are only lines, on a cluster with the time of day.  Where nothing can be written any more (a
closed pipe, a terminal that has gone) the console falls silent and the run goes on: `metrics.jsonl` has it all.

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
from datetime import datetime
from types import TracebackType
from typing import IO, Any, Self, TextIO, cast

from engine.progress import Progress, duration, thousands

ETA_WINDOW = 100            # logged steps over which the speed is averaged
MFU_KNOWN = "MFU counts causal attention"
MFU_UNKNOWN = "MFU n/a: the peak of this device and arithmetic is not known"


class Console:
    """Prints the progress of a run; use as a context manager, or call `close`.

    Args:
        total_steps: the step at which the run is done.
        stream: where to print; standard output unless given.
        is_terminal: draw a live bar; asked of the stream unless given.
        first_step: the step the run resumed after, 0 for a fresh start.
        stamped: begin every line with the time of day.
        clock: seconds; for tests.
    """

    def __init__(self, total_steps: int, stream: TextIO | None = None, is_terminal: bool | None = None,
                 first_step: int = 0, stamped: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.total_steps, self._stamped = total_steps, stamped
        self._stream = _Voice(stream if stream is not None else sys.stdout)
        self._clock = clock
        self._times: deque[tuple[int, float]] = deque(maxlen=ETA_WINDOW + 1)
        self._skipped = None if first_step else 0           # a count; what it was before a resume isn't known here
        self._bar: Progress | None = None
        if self._stream.isatty() if is_terminal is None else is_terminal:
            self._bar = Progress("step", total_steps, "steps", stream=cast(IO[str], self._stream), is_terminal=True)
            self._bar.__enter__()

    def step(self, record: Mapping[str, Any]) -> None:
        """One line for one record of `metrics.jsonl`."""
        if not self._times:
            self.note(MFU_UNKNOWN if record.get("mfu") is None else MFU_KNOWN)
        self._times.append((record["step"], self._clock()))
        self._print(step_line(record, self.total_steps, self.seconds_left()))
        skipped = record.get("skipped") or 0
        if self._skipped is not None and (more := skipped - self._skipped) > 0:
            self.warning(f"skipped {more} step{'s' * (more > 1)}, weights unchanged: the gradient was not finite or "
                         "too large, or no label counted")
        self._skipped = skipped
        if self._bar is not None:
            self._bar.reach(record["step"])

    def evaluation(self, step: int, valid_loss: float, accuracy: float | None = None) -> None:
        """One line for an evaluation; `accuracy`: the loss is of comparisons, of which so many are in order."""
        also = f"accuracy {accuracy:.1%}" if accuracy is not None else \
            f"perplexity {math.inf if valid_loss > 700 else math.exp(valid_loss):.4g}"
        self._print(f"{_position(step, self.total_steps)}  valid loss {_loss(valid_loss)}  {also}", style="cyan")

    def checkpoint(self, step: int, path: object, seconds: float | None = None) -> None:
        """One line for a checkpoint; `seconds` is how long training waited for it."""
        waited = "" if seconds is None else f" (training waited {seconds:.2f} s)"
        self._print(f"{_position(step, self.total_steps)}  saved{waited} {path}", style="green")

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
            self._bar.__exit__(None, None, None)
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def _print(self, line: str, style: str = "") -> None:
        if self._stamped:
            line = f"{datetime.now():%H:%M:%S} {line}"
        encoding = self._stream.encoding
        line = line.encode(encoding, "replace").decode(encoding)          # a log in ASCII must not end the run
        if self._bar is not None:
            self._bar.print(line, style)
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
    scored = "critic/score/mean" in record                  # a run that learns from its own texts
    what = (f"score {_loss(record['critic/score/mean']):>6}  KL {_norm(record.get('objective/kl')):>5}" if scored else
            f"loss {_loss(record.get('loss')):>6}")
    parts = [_position(record["step"], total_steps), what,
             f"norm {_norm(record.get('grad_norm')):>5}", f"lr {_short(record.get('lr')):>6}",
             f"{_rate(record.get('tokens_per_second')):>5} tok/s"]
    if (mfu := record.get("mfu")) is not None:
        parts.append(f"MFU {100 * mfu:4.1f}%")
    if seconds_left is not None:
        parts.append(f"{duration(seconds_left):>7}")
    return "  ".join(parts)


def mfu_text(mfu: float | None) -> str:
    """`MFU 48.5 % (causal)`, or `MFU n/a (causal)` where the device's peak isn't known."""
    return "MFU n/a (causal)" if mfu is None else f"MFU {100 * mfu:.1f} % (causal)"


def _position(step: int, total_steps: int) -> str:
    return f"step {step:>{len(str(total_steps))}}"


def _loss(value: float | None) -> str:
    """Six characters: `3.2145`, `10.988`, `123.46`, `2.5e7`."""
    return _rounded(value, 4)


def _norm(value: float | None) -> str:
    """Five characters: `0.012`, `1.023`, `12.35`, `123.5`, `1.2e4`, `2e-7`."""
    return _short(value, 0) if value is not None and 0 < value < 0.9995e-3 else _rounded(value, 3)


def _rounded(value: float | None, digits: int) -> str:
    """As many digits behind the point below ten, one less for each digit in front of it; exponents from 1,000 on."""
    if value is None or not math.isfinite(value):
        return "n/a" if value is None else str(value)
    for limit, places in ((10, digits), (100, digits - 1), (1000, digits - 2)):
        if round(abs(value), places) < limit:
            return f"{value:.{places}f}"
    return _short(value)


def _short(value: float | None, digits: int = 1) -> str:
    """`3.0e-4`: few digits, and an exponent without zeros."""
    if value is None:
        return "n/a"
    number, e, exponent = f"{value:.{digits}e}".partition("e")
    return f"{number}e{int(exponent)}" if e else number


def _rate(value: float | None) -> str:
    return "n/a" if value is None else thousands(value)
