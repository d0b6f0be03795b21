"""The folder of a run: one writer at a time, and nothing in it is ever overwritten by another line of training.

*One writer.*  Two runs that save into the same folder would delete each other's checkpoints.  So rank 0 holds a lock
(`flock` on `.lock`) while it trains; the kernel lets go of it when the process ends, however it ends: no lock is ever
left behind.

*Nothing lost.*  With `checkpoint.resume: auto` a folder holds one line of training: what is there is gone on with.
`never`, or the path of a checkpoint, begins another line.  What the folder holds of the one before, and is not
part of the new one, moves to `earlier-1`, `earlier-2` …, each a run's folder in its own right.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from engine.checkpoint.folder import BEST, CHECKPOINTS, committed_steps
from engine.errors import RequestError
from engine.metrics.events import EVENTS_FILE
from engine.metrics.sinks import METRICS_FILE, ROLLOUTS_FILE
from engine.reliability.rewind import REWINDS_FILE
from engine.reliability.wishes import DONE_FILE

CONFIG_FILE, DOCTOR_FILE, LOCK_FILE = "config.yaml", "doctor.txt", ".lock"
NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)        # some network file systems


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[bool]:
    """Creates the folder and keeps other runs out of it; yields False where its file system has no locks.

    Raises:
        RequestError: another run holds it, it cannot be written, or it holds a configuration that no run wrote there.
    """
    if (run_dir / CONFIG_FILE).exists() and not (run_dir / DOCTOR_FILE).exists():
        raise RequestError(f"run.dir {run_dir} holds a {CONFIG_FILE} that no run wrote, and a run would replace it: "
                           "choose another run.dir")
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(run_dir / LOCK_FILE, "ab+", buffering=0)
    with file:
        exclusive = _take(file.fileno(), run_dir)
        with writing(run_dir):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield exclusive


@contextlib.contextmanager
def writing(run_dir: Path) -> Iterator[None]:
    """For what a run writes as it starts: a folder that takes nothing (read-only, a full disk) is a wrong request.

    Raises:
        RequestError: something could not be written.
    """
    try:
        yield
    except OSError as error:
        raise RequestError(f"run.dir {run_dir} cannot be written ({error.strerror or error}): make room, or choose "
                           "another") from None


def require_at_home(config_file: Path, run_dir: Path, given: bool) -> None:
    """Keeps a run whose folder was moved or copied from beginning anew where it was before.

    Args:
        config_file: what the run is started with: perhaps the record that an earlier one has left in its folder.
        run_dir: where it says that the run lives.
        given: somebody has just said so.

    Raises:
        RequestError: it is such a record, of a folder that lies elsewhere now.
    """
    home = config_file.parent
    recorded = config_file.name == CONFIG_FILE and (home / CHECKPOINTS).is_dir()
    if recorded and not given and home.resolve() != run_dir.resolve():
        raise RequestError(f"{config_file} is the record of the run in {home}, and says that it is in {run_dir}: to go "
                           f"on here, add run.dir={home}; for another run, run.dir=SOMEWHERE")


def _take(descriptor: int, run_dir: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS_HERE:
            return False
        holder = (run_dir / LOCK_FILE).read_text(encoding="utf-8") or "another process"
        raise RequestError(f"run.dir {run_dir} is in use: {holder} is training in it; wait until it has ended, or "
                           "choose another run.dir") from None
    return True


def begin_another_line(run_dir: Path, after_step: int | None) -> Path | None:
    """Moves what belongs to an earlier line of training out of the way.

    Args:
        run_dir: locked by the caller.
        after_step: the new line goes on from this step of the old one, which keeps its checkpoints and metrics
            up to there; None: it has nothing in common with it.

    Returns:
        The folder that holds the earlier line now; None if there was nothing to move.

    Raises:
        RequestError: something cannot be moved.
    """
    folders, files = (run_dir / CHECKPOINTS, run_dir / BEST), (
        run_dir / METRICS_FILE, run_dir / ROLLOUTS_FILE, run_dir / REWINDS_FILE, run_dir / DONE_FILE)
    if after_step is None:
        later = [path for path in (*folders, *files) if path.exists()]
    else:
        later = [path for folder in folders for step, path in committed_steps(folder).items() if step > after_step]
    if not later:
        return None
    earlier = _next_free(run_dir)
    try:
        for path in later:
            target = earlier / path.relative_to(run_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        for name in (METRICS_FILE, ROLLOUTS_FILE, CONFIG_FILE, DOCTOR_FILE, EVENTS_FILE, REWINDS_FILE):
            if (run_dir / name).exists():
                shutil.copy2(run_dir / name, earlier / name)
    except OSError as error:
        raise RequestError(f"what {run_dir} holds of an earlier run cannot be moved to {earlier}: {error}") from None
    return earlier


def _next_free(run_dir: Path) -> Path:
    number = 1
    while (run_dir / f"earlier-{number}").exists():
        number += 1
    return run_dir / f"earlier-{number}"
