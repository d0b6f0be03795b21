"""Where a run's records go: `metrics.jsonl` always, TensorBoard, Weights & Biases and MLflow where asked for.

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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engine.config import Config, LogConfig
from engine.errors import RequestError

Record = Mapping[str, Any]

METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"        # some texts of every step, of runs that learn from their own


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

    def __init__(self, config: Config, run_dir: Path, resumed_step: int = 0) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(run_dir / "tensorboard"), purge_step=resumed_step + 1)

    def log(self, record: Record) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Sends configuration and records to Weights & Biases; a resumed run goes on under its old identity.

    The axis is the record's own `step`, because wandb's counter refuses to go back to the step of a checkpoint.
    """

    def __init__(self, config: Config, run_dir: Path, resumed_step: int = 0) -> None:
        """
        Raises:
            RequestError: nobody is logged in, or the service cannot be reached.
        """
        wandb, identity = importlib.import_module("wandb"), run_dir / "wandb-run-id.txt"
        if resumed_step == 0 or not identity.is_file():
            identity.write_text(uuid.uuid4().hex[:12])
        try:
            self._run = wandb.init(project=config.log.wandb, name=config.run.name or run_dir.name, dir=str(run_dir),
                                   id=identity.read_text().strip(), resume="allow", config=config.to_dict())
        except wandb.Error as error:
            raise RequestError(f"log.wandb: Weights & Biases cannot be used ({error}): log in with `wandb login`, "
                               "keep the records here with WANDB_MODE=offline, or set log.wandb=null") from None
        self._run.define_metric("*", step_metric="step")

    def log(self, record: Record) -> None:
        self._run.log({"step": record["step"], **scalars(record)})

    def close(self) -> None:
        self._run.finish()


class MlflowSink:
    """Sends configuration and records to the MLflow server of MLFLOW_TRACKING_URI, or where MLflow keeps them here."""

    def __init__(self, config: Config, run_dir: Path, resumed_step: int = 0) -> None:
        """
        Raises:
            RequestError: the server cannot be used.
        """
        self._mlflow, identity = importlib.import_module("mlflow"), run_dir / "mlflow-run-id.txt"
        resumed = identity.read_text().strip() if resumed_step and identity.is_file() else None
        try:
            self._mlflow.set_experiment(config.log.mlflow)
            run = self._mlflow.start_run(run_id=resumed, run_name=config.run.name or run_dir.name)
            if resumed is None:                          # MLflow refuses a parameter that changes
                self._mlflow.log_params({key: str(value)[:MLFLOW_LONGEST] for key, value in flat(config.to_dict())})
        except self._mlflow.exceptions.MlflowException as error:
            raise RequestError(f"log.mlflow: MLflow cannot be used ({error}): set MLFLOW_TRACKING_URI to a server that "
                               "is there, or log.mlflow=null") from None
        identity.write_text(run.info.run_id)

    def log(self, record: Record) -> None:
        self._mlflow.log_metrics(scalars(record), step=record["step"])

    def close(self) -> None:
        self._mlflow.end_run()


@dataclass(frozen=True)
class Optional:
    """A row of the table of sinks that a configuration may ask for.

    Attributes:
        key: of the section `log`; what is not false or null asks for it.
        package: that it needs.
        install: how to get that.
        without: the override that does without.
        sink: opened with the configuration, the run's folder and the step it resumes after.
    """

    key: str
    package: str
    install: str
    without: str
    sink: Callable[[Config, Path, int], Sink]


OPTIONAL = (
    Optional("tensorboard", "tensorboard", "pip install 'octant[viz]'", "log.tensorboard=false", TensorboardSink),
    Optional("wandb", "wandb", "pip install 'octant[viz]'", "log.wandb=null", WandbSink),
    Optional("mlflow", "mlflow", "pip install mlflow", "log.mlflow=null", MlflowSink),
)
MLFLOW_LONGEST = 500                       # characters of a parameter's value that every version takes


def scalars(record: Record) -> dict[str, float]:
    """The finite numbers of a record, but for its step."""
    return {name: float(value) for name, value in finite_record(record).items()
            if name != "step" and isinstance(value, bool | int | float)}


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"a": {"b": 1}}` as `("a.b", 1)`."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _wanted(log_config: LogConfig) -> list[Optional]:
    return [row for row in OPTIONAL if getattr(log_config, row.key)]


def require_packages(log_config: LogConfig) -> None:
    """Looks for the optional packages that the section `log` needs, without importing them: before a job is started.

    Raises:
        RequestError: one isn't installed.
    """
    for row in _wanted(log_config):
        if importlib.util.find_spec(row.package) is None:
            raise _missing(row, "no such module")


def _missing(row: Optional, why: str) -> RequestError:
    return RequestError(f"The configuration logs to {row.package}, which isn't installed here ({why}). "
                        f"Install it with {row.install}, or set {row.without}.")


def open_sinks(config: Config, run_dir: Path, resumed_step: int = 0) -> list[Sink]:
    """Open the sinks the configuration asks for, on rank 0.

    Args:
        config: the run's; its section `log` says which.
        run_dir: the run's directory; created where missing.
        resumed_step: the step the run resumes after; 0 for a fresh start, which begins `metrics.jsonl` anew.

    Raises:
        RequestError: what was asked for isn't installed, or cannot be used.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    optional = []
    for row in _wanted(config.log):
        try:
            importlib.import_module(row.package)
        except ImportError as error:
            raise _missing(row, str(error)) from error
        optional.append(row.sink(config, run_dir, resumed_step))
    jsonl = JsonlSink(run_dir / METRICS_FILE)
    jsonl.truncate_after(resumed_step)
    return [jsonl, *optional]
