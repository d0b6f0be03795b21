"""The mesh: a topology with its process groups.  The only place that creates groups.

A rank needs one group per axis, and three that combine axes:

    gradient   data × context    ranks that hold the same parameters and different tokens: gradients are summed here,
                                 and ZeRO shards over it
    ends       first and last pipeline stage, which share tied embeddings
    world      everybody: the gradient norm and the logged loss

`Axis` is what layers get to see.  An axis of size one has no group, and every collective in `collectives` returns at
once for it: one process runs the same code as 2,048.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from engine.distributed.topology import Topology
from engine.errors import RequestError


@dataclass(frozen=True)
class Axis:
    """One direction of the mesh as seen from one rank."""

    name: str
    ranks: tuple[int, ...]
    index: int
    group: dist.ProcessGroup | None

    @property
    def size(self) -> int:
        return len(self.ranks)

    @staticmethod
    def single(name: str, rank: int = 0) -> Axis:
        """The axis of size one."""
        return Axis(name, (rank,), 0, None)


@dataclass(frozen=True)
class Mesh:
    """This rank's place among all."""

    topology: Topology
    rank: int
    device: torch.device
    tensor: Axis
    context: Axis
    pipeline: Axis
    data: Axis
    gradient: Axis
    ends: Axis
    world: Axis

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline.index == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline.index == self.pipeline.size - 1


def single_mesh(device: torch.device | str = "cpu") -> Mesh:
    """The mesh of one process; needs no `torch.distributed`."""
    axes = {name: Axis.single(name)
            for name in ("tensor", "context", "pipeline", "data", "gradient", "ends", "world")}
    return Mesh(Topology(), 0, torch.device(device), **axes)


def build_mesh(topology: Topology, device: torch.device | str, timeout_seconds: float = 600.0) -> Mesh:
    """Creates this rank's process groups.  Every rank of the default group must call it with the same topology.

    Each rank creates only the groups that it belongs to (`use_local_synchronization`), so the cost does not grow with
    the size of the job.

    Raises:
        RequestError: the job has another number of processes than the topology.
    """
    if topology.world_size == 1 and not dist.is_initialized():
        return single_mesh(device)
    world_size, rank = dist.get_world_size(), dist.get_rank()
    if world_size != topology.world_size:
        raise RequestError(f"the layout needs {topology.world_size} processes, the job has {world_size}; "
                           "a node that did not join, or a wrong --nproc-per-node")
    timeout = timedelta(seconds=timeout_seconds)

    def axis(name: str, ranks: Sequence[int]) -> Axis:
        group = None
        if len(ranks) > 1:
            group = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)
        return Axis(name, tuple(ranks), tuple(ranks).index(rank), group)

    def line(name: str, *axes: str) -> Axis:
        return axis(name, topology.group_of(rank, *axes))

    tensor, context, pipeline, data = (line(a, a) for a in ("tensor", "context", "pipeline", "data"))
    if topology.context == 1:
        gradient = Axis("gradient", data.ranks, data.index, data.group)
    elif topology.data == 1:
        gradient = Axis("gradient", context.ranks, context.index, context.group)
    else:
        gradient = line("gradient", "data", "context")
    first_and_last = tuple(dict.fromkeys((pipeline.ranks[0], pipeline.ranks[-1])))
    ends = axis("ends", first_and_last) if rank in first_and_last else Axis.single("ends", rank)
    world = Axis("world", tuple(range(world_size)), rank, dist.group.WORLD if world_size > 1 else None)
    return Mesh(topology, rank, torch.device(device), tensor, context, pipeline, data, gradient, ends, world)
