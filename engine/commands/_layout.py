"""How a command becomes several processes, and how one of them becomes a rank.

Under torchrun or srun the command is one rank of the job.  Started plainly it is all of the job where one process is
enough; else it starts the ranks itself, each with the words it was started with.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from engine.config import Config, ParallelConfig, resolve_layout
from engine.config.placement import learns_from_own_texts, processes_needed
from engine.distributed.environment import LaunchEnvironment, launch_environment
from engine.distributed.topology import Topology
from engine.errors import ConfigError
from engine.launching.local import RankFailure, launch_local, run_as_rank

OnThisRank = Callable[[Topology, LaunchEnvironment | None], None]


def start_ranks(args: argparse.Namespace, world_size: int, folder: Path, *, graceful: bool = False,
                show_stderr: bool = False) -> int:
    """This command once per rank; the arguments and what is raised are those of `launch_local`."""
    return launch_local([sys.executable, "-m", "engine", *args.argv], world_size, folder, graceful=graceful,
                        show_stderr=show_stderr)


def local_processes(config: Config) -> int:
    """How many processes a plain start of a job takes.

    Raises:
        ConfigError: the layout is one that no number of replicas mends; before torch is there.
    """
    if learns_from_own_texts(config):
        needed = processes_needed(config)
        actor = config.roles.actor.parallel or config.parallel
        return needed or actor.model_parallel_size * _local_replicas(config, actor)
    parallel = config.parallel
    if parallel.data == "auto":
        resolve_layout(config, parallel.model_parallel_size)
    data = parallel.data if isinstance(parallel.data, int) else _local_replicas(config, parallel)
    return data * parallel.model_parallel_size


def _local_replicas(config: Config, parallel: ParallelConfig) -> int:
    """What `parallel.data: auto` means here: as many as there are GPUs for; on the CPU one."""
    if config.run.device == "cpu":
        return 1
    return max(1, import_module("torch").cuda.device_count() // parallel.model_parallel_size)


def run_in_layout(args: argparse.Namespace, on_this_rank: OnThisRank, *, data_parallel: bool = False) -> int:
    """For commands that use a model in the layout `--tensor` × `--pipeline`: runs `on_this_rank` on all its ranks.

    Args:
        data_parallel: a launcher may start several copies of the layout.

    Raises:
        ConfigError: a degree is no degree, or the launcher started another number of processes than the layout needs.
        RankFailure: a process failed; its log is kept.
        BrokenPipeError: nobody reads the output any more.
    """
    topology = Topology(tensor=args.tensor, pipeline=args.pipeline)
    launched = launch_environment()
    if launched is None and topology.world_size > 1:
        return _start_ranks_aside(args, topology.world_size)
    if launched is None:
        on_this_rank(topology, None)
        return 0
    topology = _fit(topology, launched, data_parallel)

    def work() -> int:
        on_this_rank(topology, launched)
        return 0

    return run_as_rank(launched, launched.logs, work)


def _fit(topology: Topology, launched: LaunchEnvironment, data_parallel: bool) -> Topology:
    """The layout for as many processes as there are."""
    there, size = launched.world_size, topology.world_size
    if there % size or (there != size and not data_parallel):
        raise ConfigError(f"--tensor {topology.tensor} × --pipeline {topology.pipeline} needs {size} processes"
                          + f"{' or a multiple' if data_parallel else ''}; {launched.launcher} started {there}")
    return replace(topology, data=there // size)


def _start_ranks_aside(args: argparse.Namespace, world_size: int) -> int:
    """With a folder for their logs, which is left behind where a message names it: after a failure."""
    folder = Path(tempfile.mkdtemp(prefix=f"octant-{args.verb}-"))
    kept = False
    try:
        return start_ranks(args, world_size, folder, show_stderr=True)
    except RankFailure as failure:
        if failure.kind == BrokenPipeError.__name__:
            raise BrokenPipeError from None
        kept = failure.exit_code != 2
        raise
    finally:
        if not kept:
            shutil.rmtree(folder)
