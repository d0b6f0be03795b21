"""Worker processes for reward functions (`engine.rl.worker`): started, asked under a time limit, killed, started anew.

A worker is a program of its own that begins afresh, so that nothing is forked from a process with threads, and it is
the first of a process group of its own, so that it is ended with everything that a function has started.  What is said
to it and what it answers are lines of JSON; neither writing nor reading waits longer than the limit.  No torch here:
functions are looked for before a job starts.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from signal import SIGKILL
from typing import Any

from engine.config import RewardSource
from engine.errors import RequestError
from engine.rl.functions import BUILT_IN, PLACE

IMPORT_SECONDS = 120.0


class Failed(Exception):
    """A call came to nothing: it raised, was late, or its process died."""

    def __init__(self, why: str, late: bool = False) -> None:
        super().__init__(why)
        self.late = late


class Worker:
    """A process that calls one function, while it lives."""

    def __init__(self, function: str, seconds: float) -> None:
        self._function, self._seconds = function, seconds
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, call: dict[str, Any]) -> list[float]:
        """The scores of some texts.

        Raises:
            Failed: there are none.  RequestError: the function cannot be used.
        """
        process = self._started()
        answer = self._exchanged(process, json.dumps(call, default=str).encode() + b"\n", self._seconds)
        if "raised" in answer:
            raise Failed(f"raises {answer['raised']}")
        if "unusable" in answer:
            raise RequestError(answer["unusable"])
        return [float(score) for score in answer["scores"]]

    def start(self) -> None:
        """
        Raises:
            RequestError: the function is not there, or cannot be imported.
        """
        self._started()

    def close(self) -> None:
        """Ends the process, and what it has started."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None:
            return self._process
        command = [sys.executable, "-m", "engine.rl.worker", self._function, str(self._seconds)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                                         start_new_session=True)
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        try:
            answer = self._exchanged(self._process, b"", IMPORT_SECONDS)
        except Failed as error:
            raise RequestError(f"importing it {error}") from None
        if "refused" in answer:
            self.close()
            raise RequestError(answer["refused"])
        return self._process

    def _exchanged(self, process: subprocess.Popen[bytes], request: bytes, seconds: float) -> dict[str, Any]:
        """Sends a line, and waits for one; a process that is late or dead is ended."""
        assert process.stdin is not None and process.stdout is not None
        deadline, received = time.monotonic() + seconds, b""
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        if request:
            poll.register(process.stdin, select.POLLOUT)
        while not received.endswith(b"\n"):
            ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if not ready:
                self.close()
                raise Failed(f"took longer than {seconds:g} s", late=True)
            for number, _ in ready:
                if number == process.stdout.fileno():
                    received += (data := os.read(number, 1 << 16))
                    if not data:
                        self.close()
                        raise Failed(f"ended its process (exit code {process.returncode})")
                else:
                    with contextlib.suppress(BlockingIOError, BrokenPipeError):
                        request = request[os.write(number, request):]
                    if not request:
                        poll.unregister(process.stdin)
        found: dict[str, Any] = json.loads(received)
        return found


def require_functions(sources: Sequence[RewardSource]) -> None:
    """Imports every function that a configuration names, in a process of its own.

    Raises:
        RequestError: one is not there, cannot be imported, or takes other arguments.
    """
    for source in sources:
        if source.function is None:
            continue
        where = f"roles.reward: function {source.function}"
        if source.function not in BUILT_IN and not PLACE.fullmatch(source.function):
            raise RequestError(f"{where}: there is {', '.join(BUILT_IN)}, or module:function")
        worker = Worker(source.function, source.timeout_seconds)
        try:
            worker.start()
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from None
        finally:
            worker.close()
