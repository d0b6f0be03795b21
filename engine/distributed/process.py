"""Starting this process's part of the job: device, default group, mesh.

The ranks meet in a store before they form a group.  There they first settle that all compute on the same kind of
device: with `run.device: auto` a node whose driver is gone would take the CPU, and the others would wait for it on
their GPUs until they give up.

gloo's default group connects every rank with every other as it is made, 2,047 sockets per rank of a large job; told to
be lazy (TORCH_GLOO_LAZY_INIT), it connects two ranks when the first message goes between them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from engine.distributed.environment import LaunchEnvironment
from engine.distributed.host_memory import Room, host_memory
from engine.distributed.mesh import Job, Mesh
from engine.distributed.topology import Topology
from engine.errors import RequestError

COLLECTIVE_TIMEOUT_SECONDS = 600.0


def pick_device(wanted: str, local_rank: int, own_device: bool = False) -> torch.device:
    """The device of this process: its own GPU, or the CPU.

    Args:
        wanted: `cpu`, `cuda` or `auto`.
        local_rank: its number among the processes of this host.
        own_device: the launcher shows every process its own GPU and no other, which then is number 0.

    Raises:
        RequestError: `cuda` was asked for and this process has none.
    """
    count = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and count == 0):
        return torch.device("cpu")
    index = 0 if own_device and count == 1 else local_rank
    if index >= count:
        raise RequestError(f"run.device: {wanted} needs a GPU for local rank {local_rank}, and this host has {count}: "
                           "start fewer processes per host, or set run.device: cpu")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def free_memory(device: torch.device) -> Room | None:
    """What a process may still take there; None where the system does not tell."""
    if device.type != "cuda":
        return host_memory()
    free, _ = torch.cuda.mem_get_info(device)
    return Room(free, f"free on {device}")


@contextmanager
def joined(launched: LaunchEnvironment | None, device: str, *, checked: bool = False) -> Iterator[Job]:
    """Joins the job and yields what creates this rank's meshes; leaves it again at the end.

    CPU tensors always go through gloo, so that checkpoints can agree without touching the GPU.  After an exception the
    job is not left in good order: that may wait for collectives which peers will never join.

    Raises:
        RequestError: this process has no device, or another kind of device than another one.
    """
    if launched is None:
        yield Job(pick_device(device, 0))
        return
    place = pick_device(device, launched.local_rank, launched.own_device)
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_SECONDS)
    store, _, _ = next(rendezvous(launched.init_method, launched.rank, launched.world_size, timeout=timeout))
    store.set_timeout(timeout)
    require_one_kind(dist.PrefixStore("device", store), launched, place.type)
    # No device_id: with one, NCCL groups are split off the world's communicator, which takes every rank of the world,
    # and a group is created on its own members only.
    dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo",
                            store=dist.PrefixStore("default", store), rank=launched.rank,
                            world_size=launched.world_size, timeout=timeout)
    yield Job(place, COLLECTIVE_TIMEOUT_SECONDS, checked)
    dist.destroy_process_group()


@contextmanager
def joined_mesh(launched: LaunchEnvironment | None, topology: Topology, device: str, *,
                checked: bool = False) -> Iterator[Mesh]:
    """As `joined`, for a job with one mesh over all its ranks."""
    with joined(launched, device, checked=checked) as job:
        yield job.mesh(topology)


def require_one_kind(store: dist.Store, launched: LaunchEnvironment, kind: str) -> None:
    """Every rank must call this: a few messages to the store each, whatever the size of the job.

    Raises:
        RequestError: on every rank, if some have a GPU and some have none.
    """
    if store.add(kind, 1) == 1:
        store.set(f"first {kind}", f"rank {launched.rank} on {socket.gethostname()}")
    if store.add("arrived", 1) == launched.world_size:
        store.set("kinds", " ".join(name for name in ("cpu", "cuda") if store.add(name, 0)))
    if store.get("kinds") == b"cpu cuda":
        without, with_one = (store.get(f"first {name}").decode() for name in ("cpu", "cuda"))
        raise RequestError(f"{without} has no GPU, {with_one} has one: mend or leave out that host, or set "
                           "run.device: cpu for all (run.device: cuda names every host without)")
