"""A report that follows its run: written again whenever there is something new, until the run is done."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from engine.errors import RequestError
from engine.metrics.sinks import METRICS_FILE
from engine.report.runs import Run, read_run


def states(directory: Path, seconds: float) -> Iterator[Run]:
    """The run each time its metrics have changed; the last one has all of its steps.

    A run that has logged nothing yet is waited for.  A run that was stopped or killed may go on any time, so
    this ends with the run's last step only, or with the caller.

    Raises:
        RequestError: there is no such folder; DataError, ConfigError: it holds no run, or a damaged one.
    """
    seen: tuple[int, int] | None = (-1, -1)
    while True:
        now = _stamp(directory / METRICS_FILE)
        if now != seen:
            run, seen = _read(directory), now
            if run is not None:
                yield run
            if run is not None and run.last_step >= run.config.steps:
                return
        time.sleep(seconds)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _read(directory: Path) -> Run | None:
    """None for a run that has begun and logged nothing yet."""
    try:
        return read_run(directory)
    except RequestError:
        if (directory / "config.yaml").is_file() and not _has_records(directory / METRICS_FILE):
            return None
        raise


def _has_records(path: Path) -> bool:
    return path.is_file() and b"\n" in path.read_bytes()
