"""Python's garbage collection, after the same steps on all ranks.

By itself Python looks for unreachable cycles after so many new objects: on every rank at a moment of its own, and when
one rank stops to look, all that wait for it stop too.  With thousands of ranks somebody is always looking.  While a run
steps it looks on schedule instead, and no more at what was there before the first step, which is nearly everything.

That is safe because a step leaves no cycle that holds a tensor (tests/train/test_garbage.py).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY_STEPS = 100


@contextmanager
def collected_on_schedule() -> Iterator[Callable[[int], None]]:
    """Gives what is to be called after each step, with its number; afterwards all is as it was."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()

    def after(step: int) -> None:
        if step % EVERY_STEPS == 0:
            gc.collect()

    try:
        yield after
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
