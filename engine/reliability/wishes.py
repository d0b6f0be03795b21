"""What colleagues may ask of a run by creating a file in its folder, and what it leaves there when it is done.

    STOP    save and stop; while it is there no run starts in this folder
    SAVE    save now and go on; it is removed when the save begins
    DONE    all steps are done
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

STOP_FILE, SAVE_FILE, DONE_FILE = "STOP", "SAVE", "DONE"
LOOK_SECONDS = 1.0                         # between two looks: a shared file system is asked once in a while


class Wishes:
    """Looks for the files, on one rank."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory, self._clock = directory, clock
        self._looked = -LOOK_SECONDS
        self.stop = self.save = False

    def look(self) -> None:
        """Brings `stop` and `save` up to date, now and then."""
        if self._clock() - self._looked >= LOOK_SECONDS:
            self._looked = self._clock()
            self.stop, self.save = ((self._directory / name).exists() for name in (STOP_FILE, SAVE_FILE))

    def saving(self) -> None:
        """The wish to save is being fulfilled."""
        self.save = False
        (self._directory / SAVE_FILE).unlink(missing_ok=True)
