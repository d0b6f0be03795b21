"""Events are lines that a reader finds again, whatever a killed process left between them."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

from engine import __version__
from engine.metrics.events import EVENTS_FILE, about_this_start, append_event, read_events
from engine.origin import ROOT, commit


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_events(tmp_path) == []
    append_event(tmp_path, "start", 0, about_this_start(8, "cuda (H100)"))
    with (tmp_path / EVENTS_FILE).open("a") as file:
        file.write('{"time": "yesterday"}\n[1]\n\n{"time": \n')
    append_event(tmp_path, "end", 7, {"finished": True})
    start, end = read_events(tmp_path)
    assert (start.kind, start.step, start.rank, end.kind, end.step) == ("start", 0, 0, "end", 7)
    assert start.detail["processes"] == 8 and start.detail["octant"] == __version__ and start.detail["host"]
    assert abs((datetime.now().astimezone() - end.time).total_seconds()) < 60 and end.time.tzinfo is not None


def test_the_commit_is_that_of_the_clone() -> None:
    name = commit()
    if (ROOT / ".git").exists():
        assert name is not None and re.fullmatch(r"[0-9a-f]{12}\+?", name)
    else:
        assert name is None
