"""A run that is started again after whatever happens to it, as `launch/train.sh` does, but in forked processes.

An attempt is real: a process per rank, gloo between them, a watchdog in each; they differ from those of `octant train`
in being forked from a process that has torch already, which takes a tenth of a second in place of several.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from engine.config import Config
from engine.distributed.environment import LaunchEnvironment
from engine.distributed.topology import Topology
from engine.launching.local import run_as_rank
from engine.reliability.restarts import GO_ON, after
from engine.reliability.rewind import with_rewinds
from engine.train.rank import run_rank
from engine.train.stop import StopRequest
from tests.kit.distributed import CONTEXT

GRACE_SECONDS = 1.0                        # for the peers of a rank that ended, to say why they end


@dataclass(frozen=True)
class Attempt:
    """How its ranks ended (exit codes, or minus the signal), and what is next (`engine.reliability.restarts`)."""

    codes: tuple[int, ...]
    verdict: int
    said: str


def survive(config: Config, most: int = 20) -> tuple[list[Attempt], str]:
    """Attempts until one is the last, and all that rank 0 printed."""
    folder = Path(config.run.dir)
    attempts: list[Attempt] = []
    output = folder.with_name(folder.name + ".out")
    while len(attempts) < most:
        since = time.time()
        codes = _attempt(config, folder.with_name(f"{folder.name}-store-{len(attempts)}"), output)
        verdict, said = after(config, max((abs(code) for code in codes), default=0), since)
        attempts.append(Attempt(codes, verdict, said))
        if verdict != GO_ON:
            return attempts, output.read_text()
    raise AssertionError(f"{most} attempts: {attempts}\n{output.read_text()}")


def _attempt(config: Config, store: Path, output: Path) -> tuple[int, ...]:
    size = config.parallel.world_size
    processes = [CONTEXT.Process(target=_live, args=(config, rank, size, str(store), str(output)), daemon=True)
                 for rank in range(size)]
    for process in processes:
        process.start()
    deadline, ended = time.monotonic() + 240, 0.0
    while any(process.exitcode is None for process in processes):
        if not ended and any(process.exitcode not in (None, 0, 3) for process in processes):
            ended = time.monotonic()
        if (ended and time.monotonic() > ended + GRACE_SECONDS) or time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.02)
    return tuple(process.exitcode or 0 for process in processes)


def _live(config: Config, rank: int, size: int, store: str, output: str) -> None:
    """One rank of an attempt."""
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    log = os.open(output if rank == 0 else f"{output}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.__stderr__ = sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    launched = LaunchEnvironment("torchrun", rank, size, rank, "127.0.0.1", 0, store, local_world_size=size)
    complete, stop = with_rewinds(config), StopRequest()
    os._exit(run_as_rank(launched, Path(config.run.dir), lambda: 0 if run_rank(
        complete, Topology.of(complete), launched, "", stop) else 3))
