"""`events.jsonl`: what happened to a run besides steps, one JSON object per line, written by rank 0.

    {"time": "2026-03-01T12:00:00+01:00", "kind": "start", "step": 0, "rank": 0, "detail": {"host": "gpu007", …}}

A start says where and with what; an end that the run left in good order.  A run that was killed has no end.
"""

from __future__ import annotations

import json
import platform
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from engine import __version__
from engine.origin import commit

EVENTS_FILE = "events.jsonl"


@dataclass(frozen=True)
class Event:
    """One line."""

    time: datetime
    kind: str
    step: int
    rank: int
    detail: Mapping[str, Any]


def append_event(directory: Path, kind: str, step: int, detail: Mapping[str, Any], rank: int = 0) -> None:
    """Adds a line.

    Raises:
        OSError: it cannot be written.
    """
    record = {"time": datetime.now().astimezone().isoformat(timespec="milliseconds"), "kind": kind, "step": step,
              "rank": rank, "detail": dict(detail)}
    # Half a character, as damaged files hold, stays readable as JSON's own escape of it.
    with (directory / EVENTS_FILE).open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def about_this_start(num_processes: int, device: str) -> dict[str, Any]:
    """What a reader wants to know of where and with what a run began."""
    return {"host": socket.gethostname(), "octant": __version__, "commit": commit(),
            "python": platform.python_version(), "processes": num_processes, "device": device}


def read_events(directory: Path) -> list[Event]:
    """The events of a run, in order; lines that are no events, as a killed process may leave, are passed over."""
    try:
        lines = (directory / EVENTS_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [event for line in lines if (event := _parse(line)) is not None]


def _parse(line: str) -> Event | None:
    try:
        found = json.loads(line)
        return Event(datetime.fromisoformat(found["time"]), str(found["kind"]), int(found["step"]), int(found["rank"]),
                     dict(found["detail"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
