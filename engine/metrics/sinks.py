"""Where a run's records go: `metrics.jsonl` always, TensorBoard and Weights & Biases where asked for.

A record is one flat JSON object per logged step, written by rank 0:

    step loss grad_norm lr tokens consumed_samples step_seconds tokens_per_second tflops_per_device mfu memory_bytes
    skipped, and valid_loss on evaluation steps

Two promises make `metrics.jsonl` something a script can lean on:

* Each line is valid JSON: JSON has no NaN, so a number that isn't finite is written as null.  Each line is flushed, so
  a run can be watched while it goes on.
* Each step occurs once.  A run that is interrupted after step 140 and resumes from the checkpoint of step 100 trains
  the steps 101 to 140 again; the first account of them is dropped when the file is opened, by an atomic replacement.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from engine.config import LogConfig
from engine.errors import RequestError

Record = Mapping[str, Any]

METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb-run-id.txt"
# an optional package, and what in the configuration does without it
TENSORBOARD = ("tensorboard", "log.tensorboard=false")
WANDB = ("wandb", "log.wandb=null")


class Sink(Protocol):
    """Takes one record per logged step."""

    def log(self, record: Record) -> None:
        """Write one record; it holds `step`."""

    def close(self) -> None:
        """Finish; no record follows."""


def finite_record(record: Record) -> dict[str, Any]:
    """The record as JSON can hold it: numbers of any library as Python's, those that aren't finite as None."""
    return {key: _plain(value) for key, value in record.items()}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


class JsonlSink:
    """Appends records to a JSON-lines file, each flushed as it is written."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._file = self.path.open("a", encoding="utf-8")

    def truncate_after(self, step: int) -> int:
        """Drop the records of later steps, and a last line that was cut short; returns how many lines went.

        The shortened file replaces the old one by a rename: whoever reads at that moment sees one or the other.
        """
        old = self.path.read_text(encoding="utf-8", errors="replace")
        lines = old.splitlines()
        kept = [line for line in lines if _belongs(line, step)]
        new = "".join(line + "\n" for line in kept)
        if new != old:
            self._file.close()
            replacement = self.path.with_suffix(".tmp")
            with replacement.open("w", encoding="utf-8") as file:
                file.write(new)
                file.flush()
                os.fsync(file.fileno())
            replacement.replace(self.path)
            self._file = self.path.open("a", encoding="utf-8")
        return len(lines) - len(kept)

    def log(self, record: Record) -> None:
        self._file.write(json.dumps(finite_record(record), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _belongs(line: str, last_step: int) -> bool:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return False
    return isinstance(step, int) and step <= last_step


class TensorboardSink:
    """Writes every number of a record as a TensorBoard scalar under `run_dir/tensorboard`."""

    def __init__(self, run_dir: Path, resumed_step: int = 0) -> None:
        _require(*TENSORBOARD)
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(Path(run_dir) / "tensorboard"), purge_step=resumed_step + 1)

    def log(self, record: Record) -> None:
        for name, value in _scalars(record):
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Sends records to Weights & Biases; a resumed run goes on under its old identity.

    The axis is the record's own `step`, because wandb's counter refuses to go back to the step of a checkpoint.
    """

    def __init__(self, project: str, run_dir: Path, resumed_step: int = 0) -> None:
        wandb = _require(*WANDB)
        run_dir = Path(run_dir)
        self._run = wandb.init(project=project, name=run_dir.name, dir=str(run_dir), resume="allow",
                               id=_wandb_id(run_dir / WANDB_ID_FILE, fresh=resumed_step == 0))
        self._run.define_metric("*", step_metric="step")

    def log(self, record: Record) -> None:
        self._run.log({"step": record["step"], **dict(_scalars(record))})

    def close(self) -> None:
        self._run.finish()


def _scalars(record: Record) -> list[tuple[str, float]]:
    return [(name, float(value)) for name, value in finite_record(record).items()
            if name != "step" and isinstance(value, bool | int | float)]


def _wandb_id(path: Path, fresh: bool) -> str:
    if fresh or not path.is_file():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text().strip()


def require_packages(log_config: LogConfig) -> None:
    """Looks for the optional packages that the section `log` needs, without importing them: before a job is started.

    Raises:
        RequestError: one isn't installed.
    """
    for asked, package, without in ((log_config.tensorboard, *TENSORBOARD), (log_config.wandb, *WANDB)):
        if asked and importlib.util.find_spec(package) is None:
            raise _missing(package, without, "no such module")


def _require(package: str, without: str) -> Any:
    """Import an optional package, or say how to get it and how to do without."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise _missing(package, without, str(error)) from error


def _missing(package: str, without: str, why: str) -> RequestError:
    return RequestError(f"The configuration logs to {package}, which isn't installed here ({why}). "
                        f"Install it with pip install 'octant[viz]', or set {without}.")


def open_sinks(log_config: LogConfig, run_dir: Path, resumed_step: int = 0) -> list[Sink]:
    """Open the sinks the configuration asks for, on rank 0.

    Args:
        log_config: the section `log`.
        run_dir: the run's directory; created where missing.
        resumed_step: the step the run resumes after; 0 for a fresh start, which begins `metrics.jsonl` anew.

    Raises:
        RequestError: an optional package that was asked for isn't installed.
    """
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    optional: list[Sink] = []
    if log_config.tensorboard:
        optional.append(TensorboardSink(run_dir, resumed_step))
    if log_config.wandb:
        optional.append(WandbSink(log_config.wandb, run_dir, resumed_step))
    jsonl = JsonlSink(Path(run_dir) / METRICS_FILE)
    jsonl.truncate_after(resumed_step)
    return [jsonl, *optional]
