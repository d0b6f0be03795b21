"""Local processes for a job that was started plainly: `octant train CONFIG` on a laptop or one node.

Every rank is a child with torchrun's variables, meeting the others through a file (nothing listens on the network) and
talking over the loopback interface.  Rank 0 prints to our terminal; everything else goes to `logs/rank-00003.log`.

*One cause.*  When a rank fails, its peers fail too, moments later, with errors about lost connections.  So each child
writes its own error down as it dies, with the time; the parent ends the others and reports the first cause only.

*Signals.*  A request to stop (TERM, a terminal's Ctrl-C, HUP, a scheduler's USR1) ends everything at once.  But a
training job saves first: the request is passed on to every child, and the parent follows them; a second Ctrl-C is not
passed on but ends everything.  Such children are started with these signals blocked and let them in when they can act
on them, so that none is lost and none kills a process that is still importing.

*No orphans.*  A child's standard input is a pipe from the parent.  Nothing is ever written to it; but when the parent
goes, however it goes, the pipe ends, and so does the child.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from signal import (
    SIG_BLOCK,
    SIG_IGN,
    SIG_SETMASK,
    SIGABRT,
    SIGHUP,
    SIGINT,
    SIGKILL,
    SIGTERM,
    SIGUSR1,
    Signals,
    getsignal,
    pthread_sigmask,
    signal,
)
from types import FrameType
from typing import Any

from engine.distributed.environment import LaunchEnvironment, child_environment
from engine.distributed.last_words import error_path, log_path, write_down
from engine.errors import OctantError, WorkerError

STOP_SIGNALS = (SIGTERM, SIGINT, SIGHUP, SIGUSR1)
GRACE_SECONDS = 3.0              # between the first failure and the end of its peers, who may still say more
POLL_SECONDS = 0.05
# How losing a peer reads in gloo's, NCCL's and the store's errors: the echo of another rank's failure.
LOST_PEER = re.compile(r"gloo|nccl|TCPStore|FileStore|connection (closed|reset|refused)|broken pipe|pair closure",
                       re.IGNORECASE)


class RankFailure(WorkerError):
    """The first cause, with the exit code of the rank that had it and the name of its exception's class."""

    def __init__(self, message: str, exit_code: int, kind: str = "") -> None:
        super().__init__(message)
        self.exit_code, self.kind = exit_code, kind


def end_with_parent() -> None:
    """Called by a child of `launch_local`: from now on it ends as soon as its parent does."""
    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def run_as_rank(launched: LaunchEnvironment, folder: Path | None, work: Callable[[], int]) -> int:
    """Runs `work` in a process that a launcher started as one rank of several, and returns its exit code.

    A rank that fails ends the process at once, for leaving in good order may mean to wait for peers that wait for it.
    Before that it writes down why, and where: in `folder` (None: nowhere), and in the log of a child of `launch_local`,
    else on stderr.  Where a batch script says so, all that a rank other than the first prints goes to its log.
    """
    try:
        if launched.launcher != "octant" and launched.logs is not None and launched.rank > 0:
            _print_to(log_path(launched.logs, launched.rank))
        if launched.launcher == "octant":
            end_with_parent()
        if folder is not None:
            error_path(folder, launched.rank).unlink(missing_ok=True)      # of an earlier attempt
        code = work()
        sys.stdout.flush()                                   # a closed pipe shows here
        return code
    except BaseException as error:
        code = error.exit_code if isinstance(error, OctantError) else 1
        if folder is not None:
            write_down(folder, launched.rank, error, code)
        _tell(launched, f"octant: {error}\n" if isinstance(error, OctantError) else traceback.format_exc())
        os._exit(code)


def _print_to(path: Path) -> None:
    """From now on, also of libraries and of the interpreter's last words."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)


def _tell(launched: LaunchEnvironment, text: str) -> None:
    with contextlib.suppress(OSError):
        if launched.launcher == "octant" and launched.logs is not None:
            with log_path(launched.logs, launched.rank).open("a", encoding="utf-8") as log:
                log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} rank {launched.rank} failed\n{text}")
        else:
            print(text, end="", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        sys.stdout.flush()


def launch_local(command: Sequence[str], world_size: int, run_dir: Path, *, graceful: bool = False,
                 show_stderr: bool = False) -> int:
    """Runs `command` once per rank and waits for all.

    Args:
        command: what a child runs, with `run_as_rank`.
        world_size: how many.
        run_dir: `logs/` in it takes their output.
        graceful: children stop on request (`engine.train.stop.StopRequest`), so requests are passed on to them.
        show_stderr: rank 0's goes to our terminal and not to its log.

    Returns:
        The exit code they agree on: 0, or 3 when they were asked to stop.

    Raises:
        RankFailure: one failed.
        KeyboardInterrupt: a request to stop; a second Ctrl-C if `graceful`.
    """
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    for rank in range(world_size):
        error_path(run_dir, rank).unlink(missing_ok=True)
    requests = _Requests(graceful)
    with tempfile.TemporaryDirectory(prefix="octant-") as meeting, requests.heard() as let_in:
        try:
            for rank in range(world_size):
                requests.children.append(_start(command, rank, world_size, Path(meeting) / "store", run_dir,
                                                show_stderr))
            let_in()
            return _wait(requests, run_dir)
        finally:
            _end(requests.children)


class _Requests:
    """What requests to stop do to the children.

    A terminal's Ctrl-C reaches the children directly as well; hearing of it twice does no harm.
    """

    def __init__(self, graceful: bool) -> None:
        self.graceful = graceful
        self.children: list[subprocess.Popen[bytes]] = []
        self.end_now = False        # for the waiting loop: raising out of a handler could leave `Popen` with its lock
        self._interrupts = 0

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._interrupts += number == SIGINT
        if not self.graceful or self._interrupts > 1:
            self.end_now = True
            return
        if number == SIGINT:
            say_stopping()
        for child in self.children:
            child.send_signal(SIGTERM)

    @contextlib.contextmanager
    def heard(self) -> Iterator[Callable[[], object]]:
        """Handles signals; those for graceful children wait until what this yields has been called."""
        mask = pthread_sigmask(SIG_BLOCK, STOP_SIGNALS if self.graceful else ())
        previous = {number: getsignal(number) for number in STOP_SIGNALS}
        for number, handler in previous.items():
            if handler is not SIG_IGN:                       # nohup, or a script's background job
                signal(number, self._on_signal)
        try:
            yield lambda: pthread_sigmask(SIG_SETMASK, mask)
        finally:
            for number, handler in previous.items():
                signal(number, handler)
            pthread_sigmask(SIG_SETMASK, mask)


def say_stopping() -> None:
    """Fit for a signal handler: no buffer, no lock."""
    with contextlib.suppress(OSError):
        os.write(2, b"stopping after this step and saving; Ctrl-C again ends at once\n")


def _start(command: Sequence[str], rank: int, world_size: int, store: Path, run_dir: Path,
           show_stderr: bool) -> subprocess.Popen[bytes]:
    with log_path(run_dir, rank).open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=None if rank == 0 else log,
                                stderr=None if rank == 0 and show_stderr else log,
                                env=child_environment(rank, world_size, store, run_dir))


def _wait(requests: _Requests, run_dir: Path) -> int:
    children = requests.children
    while not requests.end_now:
        codes = [child.poll() for child in children]
        if any(code not in (None, 0, 3) for code in codes):
            deadline = time.monotonic() + GRACE_SECONDS
            while time.monotonic() < deadline and any(child.poll() is None for child in children):
                time.sleep(POLL_SECONDS)
            raise _first_cause([child.poll() for child in children], run_dir)
        if all(code is not None for code in codes):
            return 3 if 3 in codes else 0
        time.sleep(POLL_SECONDS)
    raise KeyboardInterrupt


def _first_cause(codes: Sequence[int | None], run_dir: Path) -> RankFailure:
    """The rank that all others followed.

    A rank that was killed or exited without a word came first: nobody dies silently because a peer is gone, except
    by ABRT (NCCL's watchdog).  Then whoever wrote down first something else than the loss of a peer.  Where all have
    lost a peer, it is the one that has noticed nothing.
    """
    written = _written(len(codes), run_dir)
    silent = [rank for rank, code in enumerate(codes) if code not in (None, 0, 3) and rank not in written]
    own = [rank for rank, entry in written.items() if entry["exit_code"] != 1 or entry["type"] == "BrokenPipeError"
           or not LOST_PEER.search(entry["message"])]
    frozen = [rank for rank, code in enumerate(codes) if code is None and rank not in written]
    for rank in [rank for rank in silent if codes[rank] != -SIGABRT] or ([] if own else frozen or silent):
        return _silent_failure(rank, codes[rank], run_dir)
    rank = min(own or written, key=lambda rank: written[rank]["time"])
    first = written[rank]
    if first["exit_code"] != 1:                          # a wrong request, or a watchdog, which names the rank itself
        return RankFailure(first["message"], first["exit_code"], first["type"])
    return RankFailure(f"rank {rank} failed first: {first['type']}: {first['message']}\n"
                       f"its traceback is in {log_path(run_dir, rank)}", 1, first["type"])


def _silent_failure(rank: int, code: int | None, run_dir: Path) -> RankFailure:
    if code is None:
        how = "stopped answering, and its peers gave up"
    elif code < 0:
        names = {int(number): number.name for number in Signals}
        how = f"was ended by {names.get(-code, f'signal {-code}')}" + "; out of memory?" * (-code == SIGKILL)
    else:
        how = f"ended with exit code {code}"
    return RankFailure(f"rank {rank} {how} (its log: {log_path(run_dir, rank)})", 1)


def _written(world_size: int, run_dir: Path) -> Mapping[int, dict[str, Any]]:
    """By rank: what those that failed wrote down; half a file counts as nothing."""
    found = {}
    for rank in range(world_size):
        with contextlib.suppress(OSError, ValueError):
            found[rank] = json.loads(error_path(run_dir, rank).read_text(encoding="utf-8"))
    return found


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    for child in children:
        child.kill()                                         # does nothing where it has ended
    for child in children:
        if child.stdin is not None:
            child.stdin.close()
        child.wait()
