"""`octant report RUN_DIR…`: the page and pictures of a run, or of several beside one another."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.errors import RequestError
from engine.report.page import write_report
from engine.report.runs import Run, read_run
from engine.report.watch import states


def run(args: argparse.Namespace) -> int:
    """Write the page once, or with `--watch` as long as the run goes on.

    Raises:
        RequestError: no runs there, `--watch` with several, or a place that cannot be written.
    """
    if args.watch is not None:
        return _watch(args)
    _say(*_write([read_run(directory) for directory in args.run_dir], args.output))
    return 0


def _watch(args: argparse.Namespace) -> int:
    if len(args.run_dir) > 1 or args.watch < 1:
        raise RequestError(f"--watch {args.watch}: it follows one run, looking every so many seconds, 1 or more")
    last: Run | None = None
    try:
        for last in states(Path(args.run_dir[0]), args.watch):
            page, _ = _write([last], args.output, refresh=args.watch)
            print(f"{page}: step {last.last_step:,} of {last.config.steps:,}", flush=True)
    except KeyboardInterrupt:
        print(flush=True)                                    # behind the terminal's ^C
    if last is not None:
        _say(*_write([last], args.output))                   # the page as it stays loads itself no more
    return 0


def _write(runs: list[Run], output: str | None, refresh: int | None = None) -> tuple[Path, str]:
    """The page's path, and what was written."""
    name = "report" if len(runs) == 1 else "comparison"
    place = runs[0].directory if output is None else Path(output)
    page = place if place.suffix == ".html" else place / f"{name}.html"
    page, *pictures = write_report(runs, page, page.with_suffix(""), refresh)
    return page, (f"{len(runs[0].records):,} logged steps to step {runs[0].last_step:,}; {len(pictures)} pictures in "
                  f"{page.with_suffix('')}/")


def _say(page: Path, what: str) -> None:
    print(f"{page}: {what}")
    print(f"next: open {page} in a browser")
