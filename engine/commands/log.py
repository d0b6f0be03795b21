"""`octant log`: what happened to a run, in lines."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.errors import RequestError
from engine.metrics.events import EVENTS_FILE, read_events
from engine.report.story import story


def run(args: argparse.Namespace) -> int:
    directory = Path(args.run_dir)
    events = read_events(directory)
    if not events:
        raise RequestError(f"{directory} holds no {EVENTS_FILE} that says anything: give the folder of a run that has "
                           "been started (run.dir of its configuration)")
    for line in story(events, together=not args.all):
        print(line)
    return 0
