"""`octant bench mfu CONFIG`: steps of a job measured here, for one layout or several, beside what the plan says.

Started plainly, the processes of each layout are started for it and end with it, so that a layout that runs out of
memory ends itself only.  Under torchrun or srun the processes are there, and measure one layout after the other.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from engine.commands._layout import local_processes, start_ranks
from engine.commands._parser import Parser
from engine.config import Config, load_config, resolve_layout
from engine.distributed.environment import LaunchEnvironment, available_cores, launch_environment, tune_gpu
from engine.errors import ConfigError, RequestError
from engine.launching.local import RankFailure, run_as_rank
from engine.plan.calibrate import calibrated
from engine.plan.devices import Device, device, device_of_driver
from engine.plan.job import Planned
from engine.plan.memory import SLACK, gib
from engine.plan.search import words
from engine.plan.text import table
from engine.report.mfu_picture import mfu_svg
from engine.report.svg import standalone
from engine.train.made_up import steps_only
from engine.writing import MARK, refuse_other_files, write_errors, write_picture, write_whole

BATCH = ("micro",)                         # keys of a layout that are not of `parallel`
NOTHING = 1                                # exit code where a layout could not be measured


def run(args: argparse.Namespace) -> int:
    """Measure what is not measured yet, and print the table; 1 where a layout failed.

    Raises:
        RequestError: an option cannot be used, or a file cannot be written.
        ConfigError: a layout is impossible on so many processes.
    """
    asked = _options().parse_args(args.rest)
    for path in (asked.markdown, asked.svg):
        if path is not None:
            refuse_other_files([path], lambda data: data.endswith(MARK))
    if asked.show is not None:
        return _tell(asked, import_module("engine.bench.mfu_rows").read_rows(asked.show))
    if asked.config is None or asked.steps < 1 or asked.warmup < 1:
        raise RequestError("give a configuration, and at least one step: octant bench mfu CONFIG --steps 5 --warmup 2")
    launched = launch_environment()
    configs = _configs(asked, launched)
    if launched is None:
        return _start_each(args, asked, configs)
    tune_gpu(configs[asked.only or 0].parallel)
    return run_as_rank(launched, launched.logs, lambda: _on_this_rank(asked, configs, launched))


def _options() -> Parser:
    parser = Parser(prog="octant bench mfu", description="Steps of a job, measured: tokens/s, MFU, memory, causes.")
    parser.add_argument("config", metavar="CONFIG.yaml", nargs="?", help="a configuration, or the name of a preset")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, such as batch.global=64")
    parser.add_argument("--layout", action="append", default=[], metavar="'tensor=2 micro=1'",
                        help="of `parallel`, and micro; what it does not name is the configuration's, and data follows "
                             "from the processes; again for another row")
    parser.add_argument("--layouts", type=Path, metavar="FILE", help="those of octant plan --search --json")
    parser.add_argument("--processes", type=int, metavar="N", help="to start (default: as many as octant train would)")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="that are timed (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=3, metavar="N", help="steps before them (default: %(default)s)")
    parser.add_argument("--weak-of", type=int, metavar="N", help="batch.global is for N processes: take the share of "
                                                                 "as many as there are")
    parser.add_argument("--gpu", metavar="NAME", help="device of the plan (default: the one that is there)")
    parser.add_argument("--calibrate", nargs="+", default=[], type=Path, metavar="FILE", help="as of octant plan")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows; those in it are not measured again")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the time by cause")
    parser.add_argument("--show", type=Path, metavar="FILE", help="measure nothing: the tables of such a file")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    return parser


# ---------------------------------------------------------------------- which jobs


def _configs(asked: argparse.Namespace, launched: LaunchEnvironment | None) -> list[Config]:
    """The resolved job of every layout.

    Raises:
        ConfigError: one is impossible; the message names it.
    """
    found: list[Config] = []
    for layout in [*map(str.split, asked.layout), *_searched(asked.layouts)] or [[]]:
        keys = [key for word in layout for key in word.split(",") if key]
        try:
            found.append(_config(asked, [_key(each) for each in keys], launched))
        except ConfigError as error:
            raise ConfigError(f"--layout '{' '.join(layout)}': {error}" if layout else str(error)) from None
    return found


def _config(asked: argparse.Namespace, layout: list[str], launched: LaunchEnvironment | None) -> Config:
    world = asked.processes if launched is None else launched.world_size
    named = any(each.startswith("parallel.data=") for each in layout)
    free = ["parallel.data=auto"] if world is not None and not named else []
    config = load_config(asked.config, [*asked.overrides, *free, *layout])
    steps_only(config, 0)                  # refuses what has no steps of its own
    world = world or local_processes(config)
    if asked.weak_of is not None:
        share, rest = divmod(config.batch.global_ * world, asked.weak_of)
        if rest or not share:
            raise RequestError(f"--weak-of {asked.weak_of}: batch.global {config.batch.global_} × {world} processes is "
                               "no multiple of it; choose a batch.global that is")
        config = config.with_changes(batch={"global": share})
    return resolve_layout(config, world)


def _key(word: str) -> str:
    """`tensor=2` → `parallel.tensor=2`, `micro=1` → `batch.micro=1`."""
    name = word.partition("=")[0]
    return word if "." in name else f"batch.{word}" if name in BATCH else f"parallel.{word}"


def _searched(path: Path | None) -> list[list[str]]:
    """The candidates of a search.

    Raises:
        RequestError: the file holds none.
    """
    if path is None:
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["candidates"]
        return [[f"{key}={json.dumps(value).strip(chr(34))}" for key, value in each["layout"].items() if key != "data"]
                for each in found]
    except (OSError, ValueError, KeyError, TypeError):
        raise RequestError(f"{path} holds no layouts: octant plan CONFIG --search --json > {path} writes them"
                           ) from None


# ---------------------------------------------------------------------- measuring


def _start_each(args: argparse.Namespace, asked: argparse.Namespace, configs: Sequence[Config]) -> int:
    """Starts the processes of one layout after the other."""
    table_of = import_module("engine.bench.mfu_rows")
    failed = False
    with tempfile.TemporaryDirectory(prefix="octant-bench-") as folder:
        path = asked.json or Path(folder) / "rows.json"
        rows = table_of.Rows(path)
        for number, config in enumerate(configs):
            print(f"[{number + 1}/{len(configs)}] {words(config)}, {_processes(config)}", flush=True)
            each = argparse.Namespace(argv=[*args.argv, "--json", str(path), "--only", str(number)])
            try:
                start_ranks(each, config.parallel.world_size, Path(folder) / str(number), show_stderr=True)
            except RankFailure as failure:
                failed = True
                print(f"  could not be measured: {failure}", flush=True)
                rows = table_of.Rows(path)
                rows.add(table_of.failed_row(config, "", 1, str(failure)))
        _tell(asked, table_of.Rows(path).rows)
    return NOTHING if failed else 0


def _processes(config: Config) -> str:
    world = config.parallel.world_size
    return f"{world:,} process{'es' * (world > 1)}"


def _on_this_rank(asked: argparse.Namespace, configs: Sequence[Config], launched: LaunchEnvironment) -> int:
    """This rank's part of the layouts; the first rank tells and keeps."""
    process, agree, mfu, rows_of = (import_module(f"engine.{name}") for name in (
        "distributed.process", "distributed.agree", "bench.mfu", "bench.mfu_rows"))
    topology = import_module("engine.distributed.topology").Topology
    first, alone = launched.rank == 0, asked.only is not None
    say: Callable[[str], None] = (lambda line: print(f"  {line}", flush=True)) if first else lambda line: None
    with process.joined(launched, configs[0].run.device) as job:
        name, peak, memory = mfu.about(job.device)
        rows = rows_of.Rows(asked.json) if first and asked.json is not None else None
        kept: list[Any] = []
        for config in [configs[asked.only]] if alone else configs:
            if not alone:
                say(f"{words(config)}, {_processes(config)}")
            known = rows.measured(rows_of.identity(config, name)) if rows is not None else None
            known = agree.share_json(known, job.world.group)
            if known is None:
                on = _device(asked, name, launched)
                _require_fit(config, on, memory)
                measured = mfu.measure(config, job.mesh(topology.of(config)), asked.steps, asked.warmup, say)
                job.release()
                nodes = -(-launched.world_size // launched.local_world_size)
                shared = None if peak is not None or memory is not None else \
                    launched.local_world_size / available_cores()
                known = rows_of.row_of(config, name, nodes, peak, measured, None if on is None else Planned(config, on),
                                       shared)
                if rows is not None:
                    rows.add(known)
            else:
                say("measured already")
            say(_line(known))
            kept.append(known)
    if first and not alone:
        _tell(asked, kept if rows is None else rows.rows)
    return 0


def _device(asked: argparse.Namespace, name: str, launched: LaunchEnvironment) -> Device | None:
    """What the plan is for: as many to a node as there are."""
    found = device_of_driver(name) if asked.gpu is None else device(asked.gpu)
    return None if found is None else replace(calibrated(found, asked.calibrate).device,
                                              per_node=launched.local_world_size)


def _require_fit(config: Config, on: Device | None, memory: int | None) -> None:
    """
    Raises:
        RequestError: on every rank: it is more than a GPU has.
    """
    if on is not None and memory is not None:
        need = Planned(config, on).fullest.total * (1 - SLACK)
        if need > memory:
            raise RequestError(f"{words(config)} does not fit: the fullest rank would hold {gib(need)}, a device has "
                               f"{gib(memory)} (octant plan tells what of it is what)")


def _line(row: dict[str, Any]) -> str:
    speed = f"{row['step_seconds']:.4g} s a step, {row['tokens_per_second']:,.0f} tokens/s, " \
            f"{row['tflops_per_device']:.3g} TFLOP/s a device"
    mfu = "MFU n/a" if row["mfu"] is None else f"MFU {row['mfu']:.1%} causal, {row['mfu_full']:.1%} full"
    plan = row["predicted"]
    off = "" if plan is None else f"; the plan says {plan['step_seconds']:.4g} s"
    return f"{speed}, {mfu}, {gib(row['memory_bytes'])}{off}"


def _tell(asked: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> int:
    """The tables on the terminal and in the files that were asked for."""
    rows_of = import_module("engine.bench.mfu_rows")
    body, causes = rows_of.cells(rows), rows_of.cause_cells(rows)
    print("\n".join(["", *table([rows_of.HEAD, *body], right=(0, 1, 2, *range(4, len(rows_of.HEAD)))), "",
                     "of a step, measured (and by the plan):", *table(causes, right=range(2, len(causes[0])))]))
    good = [row for row in rows if "error" not in row]
    if asked.markdown is not None:
        environment = import_module("engine.bench.harness").describe_environment()
        with write_errors(asked.markdown):
            asked.markdown.parent.mkdir(parents=True, exist_ok=True)
            write_whole(asked.markdown, rows_of.markdown(rows, environment).encode() + MARK)
    if asked.svg is not None and good:
        jobs = [(f"{row['world']:,} × {row['words']}", row["breakdown"], row["predicted"] and
                 row["predicted"]["breakdown"]) for row in good]
        write_picture(asked.svg, standalone(mfu_svg("time of a step by cause, seconds", jobs)))
    return 0
