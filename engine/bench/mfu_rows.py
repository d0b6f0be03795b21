"""The table of `octant bench mfu`: a row for each job that was measured, kept in a file that sweeps go on with.

A row is known by what was measured: model, layout, batch, precision, kernels, devices and how many.  Another launch
with the same file measures what is not in it yet, so a sweep that was cut off, or whose next part runs on other nodes,
grows one table.  Rows of the same layout on more and more devices, but for the data axis, are told with their
efficiency: against the fewest devices with the same batch of a device (weak scaling), and with the same batch of all
(strong).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.bench.harness import describe_environment
from engine.bench.mfu import Measured
from engine.config import Config
from engine.errors import RequestError
from engine.metrics.throughput import throughput
from engine.model.flops import AttentionCount, flops_per_token
from engine.plan.job import Planned, layout_of
from engine.plan.search import words
from engine.writing import refuse_other_files, write_errors, write_whole

Row = dict[str, Any]
SECTIONS = ("model", "parallel", "batch", "precision", "kernels", "adapter", "optim")
SIZES = ("data",)                                            # of a layout: what more devices change
# What the plan tells apart and a clock does not: recomputation is computed, and a message is waited for like its stage.
FOLDED = {"recompute": "compute", "pipeline_comm": "pipeline_bubble"}
ATTENTION: tuple[AttentionCount, ...] = ("causal", "full")
GIB = 2**30


def identity(config: Config, device: str) -> str:
    """Of a row: equal for equal jobs on equal devices."""
    said = _measured_of(config) | {"device": device}
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _measured_of(config: Config) -> dict[str, Any]:
    """Of a configuration what a step's time depends on: enough to plan the same job."""
    values = config.to_dict()
    return {name: values[name] for name in SECTIONS} | {
        "run": {"objective": config.run.objective},
        "data": {"seq_len": config.data.seq_len, "document_mask": config.data.document_mask}}


def row_of(config: Config, device: str, nodes: int, peak: float | None, measured: Measured,
           planned: Planned | None, ranks_per_core: float | None = None) -> Row:
    """What is kept of a measurement.

    Args:
        device: as its driver calls it.
        ranks_per_core: of a CPU.
        peak: TFLOP/s of one, dense bf16; None where the data sheet is not known, and then there is no MFU.
    """
    world, seconds = config.parallel.world_size, measured.median_seconds
    tokens = config.batch.global_ * config.data.seq_len
    peak = peak if config.precision.compute == "bf16" else None
    causal, full = (throughput(tokens, seconds, flops_per_token(config.model, config.data.seq_len, count,
                                                                config.adapter), world, peak)
                    for count in ATTENTION)
    return _head(config, device, nodes) | {
        "step_seconds": seconds, "seconds": list(measured.seconds), "tokens_per_second": causal.tokens_per_second,
        "tokens_per_second_per_device": causal.tokens_per_second / world,
        "tflops_per_device": causal.tflops_per_device, "tflops_per_device_full": full.tflops_per_device,
        "mfu": causal.mfu, "mfu_full": full.mfu, "memory_bytes": measured.memory_bytes, "breakdown": measured.causes,
        "ranks_per_core": ranks_per_core, "predicted": None if planned is None else _predicted(planned),
        "commit": describe_environment()["commit"]}


def failed_row(config: Config, device: str, nodes: int, why: str) -> Row:
    """Of a job that could not be measured, and will be tried again."""
    return _head(config, device, nodes) | {"error": why}


def _head(config: Config, device: str, nodes: int) -> Row:
    model = config.model
    return {"job": identity(config, device), "world": config.parallel.world_size, "nodes": nodes, "gpu": device,
            "model": f"{model.num_layers} × {model.hidden_size}", "seq_len": config.data.seq_len,
            "global_batch": config.batch.global_, "layout": layout_of(config), "words": words(config),
            "config": _measured_of(config)}


def _predicted(planned: Planned) -> Row:
    """The plan of the same job, with causes as they are measured."""
    time, folded = planned.time, dict[str, float]()
    for cause, seconds in time.breakdown.items():
        name = FOLDED.get(cause, cause)
        folded[name] = folded.get(name, 0.0) + seconds
    return {"gpu": planned.device.name, "step_seconds": time.seconds, "step_seconds_error": planned.error,
            "mfu": time.mfu, "mfu_full": time.mfu_full, "memory_bytes": round(planned.fullest.total),
            "breakdown": folded}


class Rows:
    """The rows of a file.

    Attributes:
        rows: in the order in which they were measured.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            RequestError: the file holds something else.
        """
        refuse_other_files([path], is_table)
        self.path, self.rows = path, list[Row]()
        if path.is_file() and path.stat().st_size:
            self.rows = json.loads(path.read_bytes())["rows"]

    def measured(self, job: str) -> Row | None:
        """The row of a job, unless it failed."""
        return next((row for row in self.rows if row["job"] == job and "error" not in row), None)

    def add(self, row: Row) -> None:
        """Takes a row in, in the place of an earlier one of the same job, and writes the file.

        Raises:
            RequestError: it cannot be written.
        """
        self.rows = [*(other for other in self.rows if other["job"] != row["job"]), row]
        environment = {name: value for name, value in describe_environment().items() if name != "command"}
        content = {"benchmark": "mfu", "rows": self.rows, "environment": environment}
        with write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def is_table(data: bytes) -> bool:
    """Whether a file's content is such a table."""
    try:
        return bool(json.loads(data)["benchmark"] == "mfu")
    except (ValueError, TypeError, KeyError):
        return False


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that must be there.

    Raises:
        RequestError: it is not, or holds something else.
    """
    if not path.is_file():
        raise RequestError(f"there is no {path}: `octant bench mfu CONFIG --json {path}` makes it")
    return Rows(path).rows


def efficiency(row: Row, rows: Sequence[Row], same: Callable[[Row], Any]) -> float | None:
    """Tokens a second of a device, against those of the same layout on the fewest devices.

    Args:
        same: of what is the same in both.

    Returns:
        None where there are no fewer devices.
    """
    def kind(each: Row) -> tuple[Any, ...]:
        layout = {key: value for key, value in each["layout"].items() if key not in SIZES}
        return each["model"], each["seq_len"], each["gpu"], json.dumps(layout, sort_keys=True), same(each)

    peers = [each for each in rows if "error" not in each and kind(each) == kind(row)]
    least = min(peers, key=lambda each: int(each["world"]))
    if least["world"] == row["world"]:
        return 1.0 if len(peers) > 1 else None
    return float(row["tokens_per_second_per_device"] / least["tokens_per_second_per_device"])


def weak(row: Row, rows: Sequence[Row]) -> float | None:
    """Scaling efficiency with the same batch of a device."""
    return efficiency(row, rows, lambda each: each["global_batch"] / each["world"])


def strong(row: Row, rows: Sequence[Row]) -> float | None:
    """Scaling efficiency with the same batch of all."""
    return efficiency(row, rows, lambda each: each["global_batch"])


HEAD = ("devices", "nodes", "batch", "layout", "step s", "tokens/s", "a device", "TFLOP/s", "MFU causal", "MFU full",
        "memory GiB", "weak", "strong", "plan s", "plan GiB")


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table's rows under `HEAD`; a job that failed has its reason in the place of its numbers."""
    out = []
    for row in sorted(rows, key=lambda each: (each["world"], each["global_batch"])):
        head = (f"{row['world']:,}", f"{row['nodes']:,}", f"{row['global_batch']:,}", row["words"])
        if "error" in row:
            out.append((*head, row["error"].splitlines()[0], *[""] * (len(HEAD) - len(head) - 1)))
            continue
        plan = row["predicted"]
        out.append((*head, f"{row['step_seconds']:.4g}", f"{row['tokens_per_second']:,.0f}",
                    f"{row['tokens_per_second_per_device']:,.0f}", f"{row['tflops_per_device']:.3g}",
                    _share(row["mfu"]), _share(row["mfu_full"]), f"{row['memory_bytes'] / GIB:.3g}",
                    _share(weak(row, rows), "–"), _share(strong(row, rows), "–"),
                    *(("–", "–") if plan is None else (f"{plan['step_seconds']:.4g}",
                                                       f"{plan['memory_bytes'] / GIB:.3g}"))))
    return out


def _share(value: float | None, unknown: str = "n/a") -> str:
    return unknown if value is None else f"{value:.1%}"


def cause_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """For each row the share of every cause: measured, and behind it in brackets what the plan says."""
    good = [row for row in rows if "error" not in row]
    causes = list(dict.fromkeys(cause for row in good for cause in row["breakdown"]))
    out = [("devices", "layout", *(cause.replace("_", " ") for cause in causes))]
    for row in sorted(good, key=lambda each: (each["world"], each["global_batch"])):
        shares = []
        for cause in causes:
            planned = row["predicted"] and row["predicted"]["breakdown"].get(cause, 0.0)
            said = "" if planned is None else f" ({planned / row['predicted']['step_seconds']:.1%})"
            shares.append(f"{row['breakdown'].get(cause, 0.0) / row['step_seconds']:.1%}{said}")
        out.append((f"{row['world']:,}", row["words"], *shares))
    return out


def markdown(rows: Sequence[Row], environment: Mapping[str, str]) -> str:
    """Both tables, and what they depend on."""
    titles = ("What a step takes", "Where the time goes: measured, and in brackets by the plan")
    lines: list[str] = []
    for title, (head, *body) in zip(titles, ([HEAD, *cells(rows)], cause_cells(rows)), strict=True):
        lines += [f"## {title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head),
                  *(f"| {' | '.join(each)} |" for each in body), ""]
    gpus = ", ".join(dict.fromkeys(str(row["gpu"]) for row in rows))
    facts = {"devices": gpus} | {key: f"`{value}`" if key == "command" else value for key, value in environment.items()}
    return "\n".join([*lines, *(f"- {name}: {value}" for name, value in facts.items()), ""])
