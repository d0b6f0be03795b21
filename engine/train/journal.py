"""What a run tells: lines on the console and records in the sinks.  Mute on all ranks but 0."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.write import SaveReport
from engine.metrics.console import Console
from engine.metrics.events import append_event
from engine.metrics.sinks import Sink

ACCURACIES = ("accuracy", "rewards/accuracies")          # what objectives call the share of comparisons in order


class Journal:
    """The console and the sinks of a run; None and nothing where others speak."""

    def __init__(self, console: Console | None = None, sinks: Sequence[Sink] = (),
                 directory: Path | None = None) -> None:
        self.console, self.sinks, self.directory = console, list(sinks), directory

    def note(self, text: str) -> None:
        """A line of information."""
        if self.console is not None:
            self.console.note(text)

    def warning(self, text: str) -> None:
        """A line that should catch the eye."""
        if self.console is not None:
            self.console.warning(text)

    def incident(self, kind: str, step: int, detail: Mapping[str, Any], warning: str = "") -> None:
        """A line of `events.jsonl`, and one for people."""
        if self.directory is not None:
            with contextlib.suppress(OSError):       # a full disk: what it spoils is the log, not the training
                append_event(self.directory, kind, step, detail)
        if warning:
            self.warning(warning)

    def log(self, row: dict[str, Any]) -> None:
        """One record: a logged step's if it has a learning rate, an evaluation's if it has a loss of held-out data."""
        if self.console is None:
            return
        if "lr" in row:
            self.console.step(row)
        if "valid_loss" in row:
            accuracy = next((row[f"valid_{name}"] for name in ACCURACIES if f"valid_{name}" in row), None)
            self.console.evaluation(row["step"], row["valid_loss"], accuracy)
        for sink in self.sinks:
            try:
                sink.log(row)
            except OSError as error:                 # a full disk: what it spoils is the log, not the training
                self.console.warning(f"metrics of step {row['step']} could not be written: {error}")

    def save(self, report: SaveReport) -> None:
        """How a save went."""
        if self.console is None:
            return
        if report.warning is not None:
            self.console.warning(f"step {report.step} was saved, but {report.warning}")
        if report.error is None:
            self.console.checkpoint(report.step, report.path, report.stalled_seconds)
            self.incident("save", report.step, {"path": str(report.path)})
        else:
            self.console.warning(f"step {report.step} was not saved: {report.error}")

    def close(self) -> None:
        """Closes what writes to files."""
        if self.console is not None:
            self.console.close()
        for sink in self.sinks:
            with contextlib.suppress(OSError):       # what a full disk refused has been reported
                sink.close()


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that tensors took on this rank's GPU; on a CPU, that the process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
