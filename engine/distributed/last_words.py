"""Where a rank's output goes, and what it writes down as it fails, for whoever looks for the first cause."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path


def log_path(run_dir: Path, rank: int) -> Path:
    """Where a rank's output goes."""
    return run_dir / "logs" / f"rank-{rank:05d}.log"


def error_path(run_dir: Path, rank: int) -> Path:
    """Where a rank writes down why it fails."""
    return run_dir / "logs" / f"rank-{rank:05d}.error.json"


def write_down(run_dir: Path, rank: int, error: BaseException, exit_code: int) -> None:
    """Called by a rank that is about to fail; does its best."""
    text = str(error) or type(error).__name__
    path = error_path(run_dir, rank)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"time": time.time(), "type": type(error).__name__, "message": text,
                                    "exit_code": exit_code}), encoding="utf-8")
