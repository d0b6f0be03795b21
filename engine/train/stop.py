"""Being asked to stop: a signal is remembered, and the loop asks after each step.

A Python signal handler runs between two instructions of the main thread, so it does no more than remember.  All ranks
settle in the next step's sum that one of them was asked, and all save and stop after the same step.

A main thread that is stuck in a collective never runs its handler.  But the interpreter's own, in C, writes a byte into
a pipe as any signal arrives; a helper thread reads it, and ends the process when the time for stopping is up.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from signal import (
    SIG_BLOCK,
    SIG_DFL,
    SIG_IGN,
    SIG_UNBLOCK,
    SIGINT,
    getsignal,
    pthread_sigmask,
    set_wakeup_fd,
    signal,
)
from types import FrameType

from engine.launching.local import STOP_SIGNALS, say_stopping


class StopRequest:
    """Listens from its creation on; true once a signal has asked this process to stop.

    The first Ctrl-C asks, a second one ends the process where it stands, even inside a collective.  Signals that were
    ignored when the process started (nohup) stay ignored; those that its launcher blocked are let in.
    """

    def __init__(self) -> None:
        self._asked = False
        for number in STOP_SIGNALS:
            if getsignal(number) is not SIG_IGN:
                signal(number, self._on_signal)
        pthread_sigmask(SIG_UNBLOCK, STOP_SIGNALS)

    @contextmanager
    def bounded(self, seconds: float) -> Iterator[None]:
        """Within it, a process that was asked to stop and is still here so many seconds later ends hard."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        before, over = set_wakeup_fd(writing, warn_on_full_buffer=False), threading.Event()

        def watch() -> None:
            while not over.is_set():
                if set(os.read(reading, 64)) & set(STOP_SIGNALS) and not over.wait(seconds):
                    faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
                    os.write(2, f"asked to stop {seconds:g} s ago, and not able to: ended\n".encode())
                    os._exit(1)

        thread = threading.Thread(target=watch, name="stop-in-time", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            set_wakeup_fd(before)
            os.write(writing, b"\0")
            thread.join()
            os.close(reading)
            os.close(writing)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._asked = True
        if number == SIGINT:
            say_stopping()
            signal(SIGINT, SIG_DFL)

    def shut_out(self) -> None:
        """For a process whose work is done: a late request must not kill it on its way out, success made failure.

        An interpreter that ends gives signals their deadly default back; blocked ones never arrive.
        """
        pthread_sigmask(SIG_BLOCK, STOP_SIGNALS)

    def __call__(self) -> bool:
        return self._asked
