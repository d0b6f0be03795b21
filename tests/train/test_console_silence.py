"""The console of a run that nobody listens to any more."""

from __future__ import annotations

import os
import pty
import time
import tty

import pytest

from engine.metrics.console import Console

RECORD = {"step": 1, "loss": 3.0, "grad_norm": 1.0, "lr": 3e-4, "tokens_per_second": 1.0, "mfu": None}


def test_a_closed_pipe_makes_it_silent(capfd: pytest.CaptureFixture[str]) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        console = Console(10, stream)
        console.step(RECORD)
        assert b"step  1  loss" in os.read(reading, 1000)
        os.close(reading)
        for step in range(2, 5):
            console.step(RECORD | {"step": step})
            console.warning("nobody hears")
        console.close()
    assert capfd.readouterr() == ("", "")


def test_a_terminal_that_has_gone_makes_it_silent(capfd: pytest.CaptureFixture[str]) -> None:
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    with os.fdopen(theirs, "w") as stream:
        console = Console(10, stream)
        console.step(RECORD)
        seen = b""
        while b"loss 3.0000" not in seen:
            seen += os.read(ours, 10_000)
        os.close(ours)
        for step in range(2, 5):
            console.step(RECORD | {"step": step})
        time.sleep(0.4)                                                      # the bar is drawn by a thread of its own
        console.close()
    assert capfd.readouterr() == ("", "")
