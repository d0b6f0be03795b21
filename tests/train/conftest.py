"""What every test of a run in this process needs."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from engine.launching.local import STOP_SIGNALS


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """A run in this process takes them over."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
