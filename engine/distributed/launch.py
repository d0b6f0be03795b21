"""Local processes for a job that was started plainly: `octant train CONFIG` on a laptop or one node.

Every rank is a child with torchrun's variables, meeting the others through a file (nothing listens on the network) and
talking over the loopback interface.  Rank 0 prints to our terminal; everything else goes to `logs/rank-00003.log`.

When a rank fails, its peers fail too, moments later, with errors about lost connections.  So each child writes its own
error down as it dies, with the time; the parent ends the others and reports the *first* cause only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from signal import SIG_IGN, SIGINT, SIGTERM, Signals, signal
from types import FrameType

from engine.distributed.environment import child_environment
from engine.errors import WorkerError

GRACE_SECONDS = 3.0              # between the first failure and the end of its peers, who may still say more
POLL_SECONDS = 0.05


class RankFailure(WorkerError):
    """The first cause, with the exit code of the rank that had it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def log_path(run_dir: Path, rank: int) -> Path:
    """Where a rank's output goes."""
    return run_dir / "logs" / f"rank-{rank:05d}.log"


def error_path(run_dir: Path, rank: int) -> Path:
    """Where a rank writes down why it fails."""
    return run_dir / "logs" / f"rank-{rank:05d}.error.json"


def write_down(run_dir: Path, rank: int, error: BaseException, exit_code: int) -> None:
    """Called by a rank that is about to fail."""
    text = str(error) or type(error).__name__
    path = error_path(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"time": time.time(), "type": type(error).__name__, "message": text,
                                "exit_code": exit_code}), encoding="utf-8")


def launch_local(arguments: Sequence[str], world_size: int, run_dir: Path) -> int:
    """Runs `python -m engine ARGUMENTS` once per rank and waits for all.

    Returns:
        The exit code they agree on: 0, or 3 when they were asked to stop.

    Raises:
        RankFailure: one failed.
    """
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    for rank in range(world_size):
        error_path(run_dir, rank).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="octant-") as meeting:
        children = [_start(arguments, rank, world_size, Path(meeting) / "store", run_dir) for rank in range(world_size)]
        # A terminal's Ctrl-C reaches the children directly; a TERM to us is passed on.  They save, stop, and we follow.
        def pass_on(number: int, _: FrameType | None) -> None:
            for child in children:
                child.send_signal(number)

        previous = {SIGINT: signal(SIGINT, SIG_IGN), SIGTERM: signal(SIGTERM, pass_on)}
        try:
            return _wait(children, run_dir)
        finally:
            for number, handler in previous.items():
                signal(number, handler)
            _end(children)


def _start(arguments: Sequence[str], rank: int, world_size: int, store: Path, run_dir: Path) -> subprocess.Popen[bytes]:
    with log_path(run_dir, rank).open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "engine", *arguments], stdin=subprocess.DEVNULL,
                                stdout=None if rank == 0 else log, stderr=log,
                                env=child_environment(rank, world_size, store))


def _wait(children: Sequence[subprocess.Popen[bytes]], run_dir: Path) -> int:
    while True:
        codes = [child.poll() for child in children]
        if any(code not in (None, 0, 3) for code in codes):
            deadline = time.monotonic() + GRACE_SECONDS
            while time.monotonic() < deadline and any(child.poll() is None for child in children):
                time.sleep(POLL_SECONDS)
            raise _first_cause(codes, run_dir)
        if all(code is not None for code in codes):
            return 3 if 3 in codes else 0
        time.sleep(POLL_SECONDS)


def _first_cause(codes: Sequence[int | None], run_dir: Path) -> RankFailure:
    """From what the ranks wrote down; one killed from outside wrote nothing, and its death came first."""
    for rank, code in enumerate(codes):
        if code is not None and code < 0 and not error_path(run_dir, rank).exists():
            hint = "; out of memory?" if -code == Signals.SIGKILL else ""
            return RankFailure(f"rank {rank} was ended by {Signals(-code).name}{hint} "
                               f"(its log: {log_path(run_dir, rank)})", 1)
    written = []
    for rank in range(len(codes)):
        if error_path(run_dir, rank).exists():
            written.append((json.loads(error_path(run_dir, rank).read_text(encoding="utf-8")), rank))
    if not written:
        rank = next(i for i, code in enumerate(codes) if code not in (None, 0, 3))
        return RankFailure(f"rank {rank} ended with exit code {codes[rank]} (its log: {log_path(run_dir, rank)})", 1)
    first, rank = min(written, key=lambda entry: entry[0]["time"])
    if first["exit_code"] == 2:
        return RankFailure(first["message"], 2)
    return RankFailure(f"rank {rank} failed first: {first['type']}: {first['message']}\n"
                       f"its traceback is in {log_path(run_dir, rank)}", 1)


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    for child in children:
        if child.poll() is None:
            child.kill()
        child.wait()
