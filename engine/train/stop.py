"""Being asked to stop: a signal is remembered, and the loop asks after each step.

A Python signal handler runs between two instructions of the main thread, so it does no more than remember.  All ranks
settle in the next step's sum that one of them was asked, and all save and stop after the same step.
"""

from __future__ import annotations

from signal import SIG_BLOCK, SIG_DFL, SIG_IGN, SIG_UNBLOCK, SIGINT, getsignal, pthread_sigmask, signal
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
