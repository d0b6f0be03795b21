"""A function over many items in many processes, results in the order of the items, memory bounded.

Each worker is a fresh Python at the other end of its own socket: it builds its function once (a tokenizer is loaded),
then answers items one by one.  The parent hands out the next item wherever a worker is free, keeps early results until
it is their turn, and never runs further ahead than a few items per worker.  As every socket has one owner at each end,
a parent that is killed closes them all and the workers leave by themselves.

This isn't `multiprocessing.Pool`, because its ways to start are both wrong here: `fork` copies a process that may run
threads (torch's, a thread of gloo), and `spawn` imports the caller's main script again, which may take longer than the
work, and needs the `if __name__ == "__main__"` that scripts forget.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from engine.errors import OctantError, WorkerError

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 4  # items per worker that may be under way or waiting for their turn
START = "import sys; sys.path[:] = {path!r}; from corpus_tools.ordered_map import serve; serve({fd})"


def ordered_map(
    setup: Callable[[], Callable[[Item], Result]], items: Iterable[Item], num_workers: int
) -> Iterator[Result]:
    """Yield `setup()(item)` for each item, in order.  `setup`, items and results are pickled.

    One worker, or one item, is done in this process.

    Raises:
        OctantError: what the function raised.
        WorkerError: with the worker's traceback, for anything else that it raised and for a worker that died.
    """
    rest = iter(items)
    first = list(islice(rest, 2))
    if num_workers <= 1 or len(first) < 2:
        function = setup()
        yield from map(function, chain(first, rest))
        return
    pool: _Pool[Item, Result] = _Pool(setup, num_workers)
    try:
        yield from pool.run(chain(first, rest))
    finally:
        pool.close()


class _Pool(Generic[Item, Result]):
    def __init__(self, setup: Callable[[], Callable[[Item], Result]], num_workers: int) -> None:
        self._processes: dict[Connection, subprocess.Popen[bytes]] = {}
        for _ in range(num_workers):
            ours, theirs = socket.socketpair()
            start = START.format(path=sys.path, fd=theirs.fileno())
            process = subprocess.Popen([sys.executable, "-c", start], pass_fds=[theirs.fileno()])
            theirs.close()
            self._processes[Connection(ours.detach())] = process
        for connection in self._processes:
            self._send(connection, setup)

    def run(self, items: Iterator[Item]) -> Iterator[Result]:
        free = list(self._processes)
        working: dict[Connection, int] = {}  # which item each worker has
        done: dict[int, Result] = {}
        num_sent = num_yielded = 0
        exhausted = False
        while True:
            while free and not exhausted and num_sent - num_yielded < AHEAD * len(self._processes):
                try:
                    item = next(items)
                except StopIteration:
                    exhausted = True
                    break
                connection = free.pop()
                self._send(connection, item)
                working[connection] = num_sent
                num_sent += 1
            if num_yielded in done:
                yield done.pop(num_yielded)
                num_yielded += 1
                continue
            if not working:
                return
            for ready in wait(list(working)):
                assert isinstance(ready, Connection)
                done[working.pop(ready)] = self._receive(ready)
                free.append(ready)

    def close(self) -> None:
        """Let the workers go; one that is in the middle of an item is stopped."""
        for connection, process in self._processes.items():
            connection.close()
            process.terminate()
        for process in self._processes.values():
            process.wait()

    def _send(self, connection: Connection, message: object) -> None:
        try:
            connection.send(message)
        except OSError as error:
            raise self._death(connection) from error

    def _receive(self, connection: Connection) -> Result:
        try:
            result, refusal, trace = connection.recv()
        except (EOFError, OSError) as error:
            raise self._death(connection) from error
        if isinstance(refusal, OctantError):
            raise refusal
        if trace:
            raise WorkerError(f"a worker process failed:\n{trace}")
        return result

    def _death(self, connection: Connection) -> WorkerError:
        code = self._processes[connection].wait()
        how = f"was killed by signal {-code} (out of memory?)" if code < 0 else f"left with exit code {code}"
        return WorkerError(f"a worker process {how}; try fewer --workers")


def serve(fd: int) -> None:
    """The worker: take `setup`, then answer items until the socket closes.  Interrupts are the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(fd)
    function: Callable[[Any], Any] | None = None
    try:
        setup = connection.recv()
        while True:
            item = connection.recv()
            try:
                function = function or setup()
                answer: tuple[Any, OctantError | None, str] = (function(item), None, "")
            except OctantError as error:
                answer = (None, error, "")
            except BaseException:
                answer = (None, None, traceback.format_exc())
            connection.send(answer)
    except (EOFError, OSError):
        return
