"""Commands that use a model in a layout given by `--tensor` and `--pipeline`.

One process is enough by default.  Under torchrun or srun the command is one rank of the job; started plainly with a
larger layout it starts the ranks itself, each with the same arguments.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from engine.distributed.environment import LaunchEnvironment, launch_environment
from engine.distributed.launch import launch_local, write_down
from engine.distributed.topology import Topology
from engine.errors import OctantError

INTERRUPTED = 3
OnThisRank = Callable[[Topology, LaunchEnvironment | None], None]


def run_in_layout(args: argparse.Namespace, topology: Topology, on_this_rank: OnThisRank) -> int:
    """Runs `on_this_rank` here, or starts `topology.world_size` processes that do.

    Raises:
        RequestError: the launcher started another number of processes.
        RankFailure: a process failed; its log is kept.
    """
    launched = launch_environment()
    if launched is None and topology.world_size > 1:
        return _start_ranks(args, topology.world_size)
    if launched is not None:
        launched.expect(topology.world_size)
    if args.log_dir is None:
        on_this_rank(topology, launched)
        return 0
    assert launched is not None
    return _run_child(topology, launched, on_this_rank, Path(args.log_dir))


def _start_ranks(args: argparse.Namespace, world_size: int) -> int:
    folder = Path(tempfile.mkdtemp(prefix=f"octant-{args.verb}-"))
    code = launch_local([sys.executable, "-m", "engine", *as_arguments(args, folder)], world_size, folder)
    shutil.rmtree(folder)                                    # a failure leaves it, for its message names the log
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return code


def _run_child(topology: Topology, launched: LaunchEnvironment, on_this_rank: OnThisRank, log_dir: Path) -> int:
    """The parent says what went wrong, so this does not, but for the traceback of a bug."""
    try:
        on_this_rank(topology, launched)
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        code = error.exit_code if isinstance(error, OctantError) else 1
        write_down(log_dir, launched.rank, error, code)
        if not isinstance(error, OctantError):
            traceback.print_exc()
            sys.stderr.flush()
        return code


def as_arguments(args: argparse.Namespace, log_dir: Path) -> list[str]:
    """The command line that `args` came from, with `--log-dir`."""
    options = [f"--log-dir={log_dir}"]
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        if name in ("verb", "checkpoint", "log_dir") or value is None or value is False:
            continue
        options += [flag] if value is True else [f"{flag}={v}" for v in (value if isinstance(value, list) else [value])]
    return [args.verb, *options, "--", args.checkpoint]
