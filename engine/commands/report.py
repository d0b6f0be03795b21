"""`octant report RUN_DIR…`: the page and pictures of a run, or of several beside one another."""

from __future__ import annotations

import argparse

from engine.report.page import write_report
from engine.report.runs import read_run


def run(args: argparse.Namespace) -> int:
    """Read the runs and write `report.html` into the first one's folder (`comparison.html` for several)."""
    runs = [read_run(directory) for directory in args.run_dir]
    name = "report" if len(runs) == 1 else "comparison"
    page, *pictures = write_report(runs, runs[0].directory / f"{name}.html", runs[0].directory / name)
    print(f"{page}: {len(runs[0].records):,} logged steps to step {runs[0].last_step:,}; "
          f"{len(pictures)} pictures in {pictures[0].parent}/")
    print(f"next: open {page} in a browser")
    return 0
