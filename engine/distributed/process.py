"""Starting this process's part of the job: device, process group, mesh."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from engine.distributed.environment import LaunchEnvironment
from engine.distributed.mesh import Mesh, build_mesh, single_mesh
from engine.distributed.topology import Topology
from engine.errors import RequestError

COLLECTIVE_TIMEOUT_SECONDS = 600.0


def pick_device(wanted: str, local_rank: int) -> torch.device:
    """The device of this process: its own GPU, or the CPU.

    Raises:
        RequestError: `cuda` was asked for and this process has none.
    """
    count = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and count == 0):
        return torch.device("cpu")
    if local_rank >= count:
        raise RequestError(f"run.device: {wanted} needs a GPU for local rank {local_rank}, and this host has {count}: "
                           "start fewer processes per host, or set run.device: cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


@contextmanager
def joined_mesh(launched: LaunchEnvironment | None, topology: Topology, device: str, *,
                checked: bool = False) -> Iterator[Mesh]:
    """Joins the job and yields this rank's mesh; leaves it again at the end.

    CPU tensors always go through gloo, so that checkpoints can agree without touching the GPU.  After an exception the
    job is not left in good order: that may wait for collectives which peers will never join.
    """
    if launched is None:
        yield single_mesh(pick_device(device, 0))
        return
    place = pick_device(device, launched.local_rank)
    # No device_id: with one, NCCL groups are split off the world's communicator, which takes every rank of the world,
    # and the mesh creates a group on its own members only.
    dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", init_method=launched.init_method,
                            rank=launched.rank, world_size=launched.world_size,
                            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_SECONDS))
    yield build_mesh(topology, place, COLLECTIVE_TIMEOUT_SECONDS, checked=checked)
    dist.destroy_process_group()
