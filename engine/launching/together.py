"""What the nodes of a job do together before training: a matrix product each, and all-reduces.

Every rank prints a line as it gets to a stage, so that whoever reads them (`engine.launching.preflight` judges) sees
who did not; nobody needs to be alive at the end to tell of the others.

    started    this process runs
    met        and has found the first one
    computed   a matrix product, its speed
    even       an all-reduce over this node and a neighbour: nodes 0 and 1, 2 and 3 …
    odd        over this node and its other neighbour: nodes 1 and 2, 3 and 4 …
    ring       over the last node and the first
    all        over all

A node with a bad adapter is slow with both its neighbours, they only with it.  Sums are of known numbers, so that a
wrong one is seen as well.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from engine.distributed.environment import LaunchEnvironment, launch_environment, node_name
from engine.distributed.process import pick_device
from engine.launching.preflight import neighbours

PATIENCE_SECONDS = 60.0                    # for a stage of all nodes
REPEATS = 5


def together(kind: str) -> None:
    """One rank's part, on its device of that kind.  It ends hard, for others may be stuck in a collective for ever."""
    launched = launch_environment()
    if launched is None:
        return
    tell("started")
    ends = threading.Timer(3 * PATIENCE_SECONDS, os._exit, (1,))
    ends.daemon = True
    ends.start()
    device = pick_device(kind, launched.local_rank, launched.own_device)
    timeout = timedelta(seconds=PATIENCE_SECONDS)
    store = dist.TCPStore(launched.master_addr, launched.master_port, None, launched.rank == 0, timeout,
                          wait_for_workers=False)
    tell("met")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.PrefixStore("group", store),
                            rank=launched.rank, world_size=launched.world_size, timeout=timeout)
    tell("computed", matrix_product(device))
    for stage in ("even", "odd", "ring"):
        tell(stage, *all_reduce(own_pair(launched, stage, timeout), device))
    speed, wrong = all_reduce(dist.group.WORLD, device)
    tell("all", speed, wrong)
    store.add("done", 1)                                     # the first one keeps the store until nobody needs it
    deadline = time.monotonic() + PATIENCE_SECONDS
    while launched.rank == 0 and store.add("done", 0) < launched.world_size and time.monotonic() < deadline:
        time.sleep(0.01)
    os._exit(0)


def tell(stage: str, speed: float | None = None, wrong: str = "") -> None:
    """A line for the judge."""
    line = {"node": node_name(), "stage": stage, "speed": speed, "wrong": wrong}
    print(json.dumps({key: value for key, value in line.items() if value not in (None, "")}), flush=True)


def own_pair(launched: LaunchEnvironment, stage: str, timeout: timedelta) -> dist.ProcessGroup | None:
    """The ranks of this node and its neighbour in that round; None for a node without one."""
    per_node, mine = launched.local_world_size, None
    for pair in neighbours(stage, launched.world_size // per_node):
        ranks = sorted(node * per_node + local for node in pair for local in range(per_node))
        group = dist.new_group(ranks, timeout=timeout, group_desc=f"preflight {stage}")
        mine = group if launched.rank in ranks else mine
    return mine


def matrix_product(device: torch.device) -> float:
    """TFLOP/s of this rank's."""
    on_gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if on_gpu else (256, torch.float32)
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    seconds = timed(lambda: torch.mm(a, b), device)
    return round(2 * size**3 / seconds / 1e12, 3)


def all_reduce(group: dist.ProcessGroup | None, device: torch.device) -> tuple[float | None, str]:
    """GB/s through each rank's link (the bus bandwidth of nccl-tests), and what was wrong with the sum."""
    if group is None:
        return None, ""
    on_gpu, size = device.type == "cuda", dist.get_world_size(group)
    count = (64 << 20 if on_gpu else 1 << 20) // 4
    x = torch.ones(count, device=device)
    dist.all_reduce(x, group=group)
    wrong = "" if bool((x == size).all()) else "an all-reduce has a wrong sum"
    x.zero_()
    seconds = timed(lambda: dist.all_reduce(x, group=group), device)
    return round(2 * (size - 1) / size * 4 * count / seconds / 1e9, 3), wrong


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one, after one that does not count."""
    work()
    _wait(device)
    began = time.perf_counter()
    for _ in range(REPEATS):
        work()
    _wait(device)
    return (time.perf_counter() - began) / REPEATS


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
