"""Reading a run's folder: its configuration and the records of its `metrics.jsonl`.

A run that is still going on can be read at any time.  Only a last line without its end, which is a record being written
or a process killed while writing, is left out; any other line that isn't a record is an error, because a chart over
damaged numbers would look like a measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from engine.config import Config, load_config
from engine.errors import DataError, RequestError
from engine.metrics.events import Event, read_events
from engine.metrics.sinks import METRICS_FILE
from engine.reading import parse_object, read_bytes, shown
from engine.report.charts import Point
from engine.report.story import CHANGED

MOST_BYTES = 4 << 30                    # ten million logged steps
LARGEST = 1e300                         # of a number; charts add up and scale


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it."""

    name: str
    directory: Path
    config: Config
    records: Sequence[dict[str, Any]]
    starts: Sequence[Event] = ()                             # each time it was started, as it said then
    changes: Sequence[Event] = ()                            # what a start did otherwise than the run before it
    last_written: datetime | None = None                     # when its last record was

    def points(self, key: str) -> list[Point]:
        """(step, value) of the records that have `key`; the value is None where it wasn't finite."""
        return [(record["step"], record[key]) for record in self.records if key in record]

    def values(self, key: str) -> list[float]:
        """The finite values of `key`, in order."""
        return [value for _, value in self.points(key) if value is not None]

    def steady(self, key: str) -> float | None:
        """Median of `key` without the first record, whose step includes the warm-up."""
        values = [record[key] for record in self.records[1:] or self.records if record.get(key) is not None]
        return median(values) if values else None

    def latest(self, key: str) -> float | None:
        """The last finite value of `key`."""
        return next(reversed(self.values(key)), None)

    def step_seconds(self) -> float | None:
        """Seconds that all steps took together; a record speaks for those since the one before."""
        if not self.values("step_seconds"):
            return None
        steps = [0, *(record["step"] for record in self.records)]
        return sum((record.get("step_seconds") or 0.0) * (step - before)
                   for record, (before, step) in zip(self.records, pairwise(steps), strict=True))

    def skipped_at(self) -> list[int]:
        """The records' steps at which the count of skipped updates had grown."""
        counts = [(0, 0), *((record["step"], record["skipped"] or 0) for record in self.records if "skipped" in record)]
        return [step for (_, before), (step, after) in pairwise(counts) if after > before]

    @property
    def last_step(self) -> int:
        return int(self.records[-1]["step"])


def read_run(directory: str | Path) -> Run:
    """Read a run's folder.

    Raises:
        RequestError: the folder or its metrics are missing or empty; ConfigError: its configuration is missing.
        DataError: a line of the metrics isn't a record, or the steps don't ascend.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise RequestError(f"{directory} is not a folder; give the folder of a run (run.dir of its configuration)")
    records = read_metrics(directory / METRICS_FILE)
    config = load_config(directory / "config.yaml")
    events = read_events(directory)
    starts, changes = ([event for event in events if event.kind == kind] for kind in ("start", CHANGED))
    written = datetime.fromtimestamp((directory / METRICS_FILE).stat().st_mtime).astimezone()
    return Run(config.run.name or directory.resolve().name, directory, config, records, starts, changes, written)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, in ascending order of step.

    Raises:
        RequestError: no file, or no record in it.
        DataError: a damaged line.
    """
    try:
        complete, _, _ = read_bytes(path, MOST_BYTES).rpartition(b"\n")
    except FileNotFoundError:
        raise RequestError(f"{path} does not exist: nothing has been logged there; start the run with `octant train`"
                           ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as metrics: {error}") from None
    lines = complete.split(b"\n") if complete else []
    records = [_parse(path, index, line) for index, line in enumerate(lines, 1)]
    for index, (before, after) in enumerate(pairwise(records), 2):
        if after["step"] <= before["step"]:
            raise DataError(f"{path}, line {index}: step {after['step']} comes after step {before['step']}; every step "
                            "occurs once, in order. Two runs may have written to one folder: give each its own run.dir")
    if not records:
        raise RequestError(f"{path} holds no record yet: wait for the first logged step (log.every in config.yaml)")
    return records


def _parse(path: Path, index: int, line: bytes) -> dict[str, Any]:
    remedy = "The file is damaged: restore it, or delete that line to report the rest"
    try:
        record = parse_object(line)
    except ValueError as error:
        raise DataError(f"{path}, line {index} is not a metrics record: {error}. {remedy}") from None
    for key, value in record.items():
        if value is not None and not _is_number(value):
            raise DataError(f"{path}, line {index}: {shown(key)} is {shown(value)}, not a number or null. {remedy}")
    if not isinstance(record.get("step"), int) or record["step"] < 0:
        raise DataError(f"{path}, line {index} is not a metrics record: step is {shown(record.get('step'))}. {remedy}")
    return record


def _is_number(value: object) -> bool:
    """A finite one, of a size that a chart can have."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
