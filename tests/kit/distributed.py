"""Real gloo processes for tests, started once per world size and reused by every test of the session.

    results = run_distributed(function, 4, argument, …)      # function(argument, …) on four ranks; a list by rank

Starting processes is what costs, so a pool stays until the session ends.  A failing rank's traceback is in the raised
error; a pool in which something failed or hung is thrown away, so the next test gets fresh processes.
"""

from __future__ import annotations

import atexit
import multiprocessing as mp
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from engine.distributed.mesh import Job, Mesh
from engine.distributed.topology import Topology

CONTEXT = mp.get_context("forkserver")
# Imported once, in the process that the others are forked from: a second and a half each, and their memory is shared.
CONTEXT.set_forkserver_preload(["torch.distributed", "engine.parallel.parallelize", "engine.optim.adamw",
                               "engine.train.rank", "engine.rl.start"])


def _serve(rank: int, world_size: int, port: int, pipe: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
                      TORCH_GLOO_LAZY_INIT="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=120))
    while (request := pipe.recv_bytes()) != b"stop":
        try:
            function, args = pickle.loads(request)
            reply = (True, function(*args))
        except BaseException:
            reply = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(reply))


class Pool:
    """`world_size` processes that wait for work."""

    def __init__(self, world_size: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(rank, world_size, port, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout_seconds: float) -> list[Any]:
        request = pickle.dumps((function, args))
        for pipe in self.pipes:
            pipe.send_bytes(request)
        deadline = time.monotonic() + timeout_seconds
        waiting, results, failures = set(range(len(self.pipes))), {}, []
        while waiting and not failures and time.monotonic() < deadline:
            ready = mp.connection.wait([self.pipes[r] for r in waiting], timeout=deadline - time.monotonic())
            for pipe in ready:
                rank = self.pipes.index(pipe)
                waiting.discard(rank)
                try:
                    good, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    good, value = False, f"the process ended (exit code {self.processes[rank].exitcode})"
                if good:
                    results[rank] = value
                else:
                    failures.append(f"--- rank {rank} ---\n{value}")
        if failures or waiting:
            self.stop()
            still = f"ranks {sorted(waiting)} had not answered\n" if waiting else ""
            raise AssertionError(still + "\n".join(failures))
        return [results[rank] for rank in range(len(self.pipes))]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@cache
def _pools() -> dict[int, Pool]:
    pools: dict[int, Pool] = {}
    atexit.register(lambda: [pool.stop() for pool in pools.values()])
    return pools


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any,
                    timeout_seconds: float = 120) -> list[Any]:
    """Runs `function(*args)` on every rank and returns the results by rank; both must pickle."""
    pools = _pools()
    pool = pools.pop(world_size, None) or Pool(world_size)
    results = pool.run(function, args, timeout_seconds)
    pools[world_size] = pool      # only a pool in which all went well is used again
    return results


@cache
def job() -> Job:
    """In a worker: what creates its meshes, once per process."""
    return Job("cpu", timeout_seconds=60)


@cache
def mesh_for(topology: Topology) -> Mesh:
    """In a worker: this rank's mesh over all of them."""
    return job().mesh(topology)
