"""`octant train`: one rank of a job, or, started plainly, the local processes that the layout needs."""

from __future__ import annotations

import argparse
import sys
import traceback
from importlib import import_module
from pathlib import Path

from engine.config import Config, load_config
from engine.distributed.environment import LaunchEnvironment, launch_environment
from engine.distributed.launch import launch_local, write_down
from engine.distributed.topology import Topology
from engine.errors import OctantError
from engine.train.corpora import Corpora

STOPPED = 3


def run(args: argparse.Namespace) -> int:
    """Train as the configuration says."""
    config = load_config(args.config, args.overrides)
    launched = launch_environment()
    if launched is None:
        return _start_plainly(args, config)
    config = config.with_world_size(launched.world_size)
    try:
        return _run_rank(config, launched)
    except BaseException as error:
        code = error.exit_code if isinstance(error, OctantError) else 1
        write_down(Path(config.run.dir), launched.rank, error, code)
        if not isinstance(error, OctantError):
            traceback.print_exc()
            sys.stderr.flush()
        raise


def _start_plainly(args: argparse.Namespace, config: Config) -> int:
    """Find problems now, then run here (one process) or start the others."""
    parallel = config.parallel
    data = parallel.data if isinstance(parallel.data, int) else _local_devices(config) // parallel.model_parallel_size
    world_size = max(1, data) * parallel.model_parallel_size
    config = config.with_world_size(world_size)
    Corpora.open(config)
    if world_size == 1:
        return _run_rank(config, None)
    arguments = ["train", args.config, *args.overrides, f"parallel.data={max(1, data)}"]
    return launch_local(arguments, world_size, Path(config.run.dir))


def _local_devices(config: Config) -> int:
    """How many processes `parallel.data: auto` may fill here: one per GPU; on the CPU one replica of the model."""
    if config.run.device == "cpu":
        return config.parallel.model_parallel_size
    count = import_module("torch").cuda.device_count()
    return count or config.parallel.model_parallel_size


def _run_rank(config: Config, launched: LaunchEnvironment | None) -> int:
    rank_module = import_module("engine.train.rank")      # torch is needed from here on
    report = import_module("engine.commands.doctor").doctor_report() if launched is None or launched.rank == 0 else ""
    finished = rank_module.run_rank(config, Topology.of(config.parallel), launched, report)
    return 0 if finished else STOPPED
