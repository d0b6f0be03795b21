"""`octant bench network`: collectives and messages between processes that are started here, or that a launcher has."""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from engine.commands._layout import start_ranks
from engine.commands._parser import Parser
from engine.distributed.environment import LaunchEnvironment, launch_environment
from engine.errors import RequestError
from engine.launching.local import run_as_rank
from engine.plan.text import table
from engine.writing import MARK, refuse_other_files, write_errors, write_whole

UNITS = {"k": 2**10, "m": 2**20, "g": 2**30}
SIZES = {"cpu": "4k,64k,1M,8M", "cuda": "4k,64k,1M,16M,256M"}
HEAD = ("scope", "operation", "ranks", "bytes", "seconds", "GB/s on the wire")


def run(args: argparse.Namespace) -> int:
    """Measure on all processes; the first one tells.

    Raises:
        RequestError: there is one process only, or an option cannot be used.
    """
    asked = _options().parse_args(args.rest)
    if asked.repeats < 1 or min(_sizes(asked.sizes or SIZES["cpu"])) < 4:
        raise RequestError("--repeats and --sizes: at least one round, and 4 bytes")
    for path, is_ours in ((asked.json, _is_ours), (asked.markdown, lambda data: data.endswith(MARK))):
        if path is not None:
            refuse_other_files([path], is_ours)
    launched = launch_environment()
    if launched is None:
        world = asked.processes or max(2, import_module("torch").cuda.device_count())
        folder = Path(tempfile.mkdtemp(prefix="octant-bench-"))
        try:
            return start_ranks(args, world, folder, show_stderr=True)
        finally:
            shutil.rmtree(folder)
    return run_as_rank(launched, launched.logs, lambda: _on_this_rank(asked, launched))


def _options() -> Parser:
    parser = Parser(prog="octant bench network", description="Messages and collectives, by size, and the slow pair.")
    parser.add_argument("--processes", type=int, metavar="N", help="to start here (default: one for each GPU, or 2)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="(default: a GPU's, if any)")
    parser.add_argument("--sizes", metavar="4k,1M", help=f"bytes (default: {SIZES['cuda']}; on a CPU {SIZES['cpu']})")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="of each (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="for octant plan --calibrate")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    return parser


def _sizes(text: str) -> list[int]:
    """
    Raises:
        RequestError: it is no list of sizes.
    """
    try:
        return [int(each[:-1]) * UNITS[each[-1].lower()] if each[-1:].isalpha() else int(each)
                for each in text.split(",")]
    except (ValueError, KeyError):
        raise RequestError(f"--sizes {text}: give bytes, such as 4k,64k,1M") from None


def _is_ours(data: bytes) -> bool:
    try:
        return bool(json.loads(data)["benchmark"] == "network")
    except (ValueError, TypeError, KeyError):
        return False


def _on_this_rank(asked: argparse.Namespace, launched: LaunchEnvironment) -> int:
    if launched.world_size < 2:
        raise RequestError("a network is between processes, and there is one: --processes 2, or a launcher")
    process, network, harness = (import_module(f"engine.{name}") for name in (
        "distributed.process", "bench.network", "bench.harness"))
    per_node = launched.local_world_size
    if launched.world_size % per_node:
        raise RequestError(f"{launched.world_size} processes do not lie on whole nodes of {per_node}: start equally "
                           "many on each")
    with process.joined(launched, asked.device) as job:
        sizes = _sizes(asked.sizes or SIZES[job.device.type])
        found = network.measure(job, per_node, socket.gethostname(), sizes, asked.repeats)
    if launched.rank == 0:
        record = found.record() | {"environment": harness.describe_environment()}
        tables = _tables(record)
        print("\n\n".join("\n".join([title, *table(rows, right=range(2, len(rows[0])))]) for title, rows in
                          tables.items()))
        print("\n" + "\n".join(record["slow"] or ["no pair stands out"]))
        _write(asked, record, tables)
    return 0


def _tables(record: dict[str, Any]) -> dict[str, list[tuple[str, ...]]]:
    """Rows of text under their titles."""
    rows: list[tuple[str, ...]] = [HEAD, *((row["scope"], row["operation"], str(row["ranks"]), f"{row['num_bytes']:,}",
                     f"{row['seconds']:.3g}", f"{row['bus_bytes_per_second'] / 1e9:.3g}") for row in record["rows"])]
    fitted: list[tuple[str, ...]] = [("", "", "latency µs", "GB/s", "off by"),
              *((name, "", f"{fit['latency_seconds'] * 1e6:.1f}", f"{fit['bytes_per_second'] / 1e9:.3g}",
                 f"{fit['error']:.0%}") for name, fit in record["fit"].items())]
    return {f"{record['world']} processes on {record['nodes']} nodes": rows, "latency and bandwidth fitted": fitted}


def _write(asked: argparse.Namespace, record: dict[str, Any], tables: dict[str, list[tuple[str, ...]]]) -> None:
    lines = []
    for title, (head, *body) in tables.items():
        lines += [f"## {title[0].upper()}{title[1:]}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head),
                  *(f"| {' | '.join(row)} |" for row in body), ""]
    lines += [*(f"- {line}" for line in record["slow"] or ["no pair stands out"]), "",
              *(f"- {name}: {value}" for name, value in record["environment"].items()), ""]
    content = json.dumps(record, indent=1, ensure_ascii=False).encode() + b"\n"
    for path, data in ((asked.json, content), (asked.markdown, "\n".join(lines).encode() + MARK)):
        if path is not None:
            with write_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, data)
