"""Commands that use a model in a layout given by `--tensor` and `--pipeline`.

One process is enough by default.  Under torchrun or srun the command is one rank of the job; started plainly with a
larger layout it starts the ranks itself, each with the same arguments.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from engine.distributed.environment import LaunchEnvironment, launch_environment
from engine.distributed.launch import RankFailure, end_with_parent, launch_local, log_path, write_down
from engine.distributed.topology import Topology
from engine.errors import ConfigError, OctantError

OnThisRank = Callable[[Topology, LaunchEnvironment | None], None]


def run_in_layout(args: argparse.Namespace, on_this_rank: OnThisRank, *, data_parallel: bool = False) -> int:
    """Runs `on_this_rank` here, or starts the processes of the layout, which do.

    Args:
        data_parallel: a launcher may start several copies of the layout.

    Raises:
        ConfigError: a degree is no degree, or the launcher started another number of processes than the layout needs.
        RankFailure: a process failed; its log is kept.
    """
    topology = Topology(tensor=args.tensor, pipeline=args.pipeline)
    launched = launch_environment()
    if launched is None and topology.world_size > 1:
        return _start_ranks(args, topology.world_size)
    if launched is not None:
        topology = _fit(topology, launched, data_parallel)
    if launched is not None and args.log_dir is not None:
        _run_child(topology, launched, on_this_rank, Path(args.log_dir))
    else:
        on_this_rank(topology, launched)
    return 0


def _fit(topology: Topology, launched: LaunchEnvironment, data_parallel: bool) -> Topology:
    """The layout for as many processes as there are."""
    there, size = launched.world_size, topology.world_size
    if there % size or (there != size and not data_parallel):
        raise ConfigError(f"--tensor {topology.tensor} × --pipeline {topology.pipeline} needs {size} processes"
                          + f"{' or a multiple' if data_parallel else ''}; {launched.launcher} started {there}")
    return replace(topology, data=there // size)


def _start_ranks(args: argparse.Namespace, world_size: int) -> int:
    """With a folder for their logs, which is left behind where a message names it: after a failure."""
    folder = Path(tempfile.mkdtemp(prefix=f"octant-{args.verb}-"))
    command = [sys.executable, "-m", "engine", *as_arguments(args, folder)]
    kept = False
    try:
        return launch_local(command, world_size, folder, show_stderr=True)
    except RankFailure as failure:
        kept = failure.exit_code != 2
        raise
    finally:
        if not kept:
            shutil.rmtree(folder)


def _run_child(topology: Topology, launched: LaunchEnvironment, on_this_rank: OnThisRank, log_dir: Path) -> None:
    """The parent says what went wrong.  A rank that fails ends at once, for leaving in good order waits for peers."""
    end_with_parent()
    try:
        on_this_rank(topology, launched)
    except Exception as error:
        code = error.exit_code if isinstance(error, OctantError) else 1
        write_down(log_dir, launched.rank, error, code)
        if not isinstance(error, OctantError):
            log_path(log_dir, launched.rank).open("a", encoding="utf-8").write(traceback.format_exc())
        os._exit(code)


def as_arguments(args: argparse.Namespace, log_dir: Path) -> list[str]:
    """The command line that `args` came from, with `--log-dir`."""
    options = [f"--log-dir={log_dir}"]
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        if name in ("verb", "checkpoint", "log_dir") or value is None or value is False:
            continue
        options += [flag] if value is True else [f"{flag}={v}" for v in (value if isinstance(value, list) else [value])]
    return [args.verb, *options, "--", args.checkpoint]
