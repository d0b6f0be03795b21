"""The profiler of a run: a trace of some steps, and a picture of the GPU's memory, in the run's folder.

It listens to the phases (`engine.metrics.phases`): it starts before the first phase of its first step and writes before
the first phase behind its last, so that what is done after that step is in the trace.  In it every phase and every
action of the schedule stands under its name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from engine.config import ProfileConfig
from engine.errors import RequestError
from engine.metrics.phases import Moment

FOLDER = "profile"
MEMORY_EVENTS = 100_000                    # allocations and frees that a snapshot remembers, the latest


class StepProfiler:
    """A listener that records the steps of `config` on this rank.

    Args:
        directory: the run's folder.
        tell: takes a line about what was written, or why it was not.
    """

    def __init__(self, config: ProfileConfig, directory: Path, device: torch.device, rank: int,
                 tell: Callable[[str], None]) -> None:
        """
        Raises:
            RequestError: a picture of the memory is asked for and the device has none.
        """
        if config.steps is not None and config.memory and device.type != "cuda":
            raise RequestError(f"profile.memory is a snapshot of a GPU's memory, and this run is on {device.type}: set "
                               "profile.memory to false")
        self._first: int
        self._stop: int
        self._first, self._stop = config.steps or (1, 1)
        self._memory, self._on_gpu, self._tell = config.memory, device.type == "cuda", tell
        self._path = directory / FOLDER / f"rank-{rank:05d}-steps-{self._first}-{self._stop - 1}"
        self._profile: torch.profiler.profile | None = None

    def __call__(self, moment: Moment) -> None:
        """Starts and stops where it is time."""
        if self._profile is not None and moment.step >= self._stop:
            self.close()
        elif self._profile is None and self._first <= moment.step < self._stop:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
            self._profile = torch.profiler.profile(activities=activities, record_shapes=True)
            if self._memory:
                torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
            self._profile.start()

    def close(self) -> None:
        """Writes what has been recorded, if anything; a disk that is full costs the trace and nothing else."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        profile.stop()
        trace, snapshot = self._path.with_name(self._path.name + ".json.gz"), self._path.with_suffix(".pickle")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(trace))
            if self._memory:
                torch.cuda.memory._dump_snapshot(str(snapshot))
                torch.cuda.memory._record_memory_history(enabled=None)
        except (OSError, RuntimeError) as error:
            self._tell(f"the profile could not be written: {error}")
            return
        self._tell(f"profile (open it at ui.perfetto.dev): {trace}")
        if self._memory:
            self._tell(f"memory (open it at pytorch.org/memory_viz): {snapshot}")
