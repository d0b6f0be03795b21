"""The mesh: a topology with its process groups.  The only place that creates groups.

A rank needs one group per axis, and two that combine axes:

    gradient   data × context    ranks that hold the same parameters and different tokens: gradients are summed here,
                                 and ZeRO shards over it
    world      everybody: the gradient norm and the logged loss

`gradient` itself may be split for ZeRO: state is sharded along `shard`, and the shards of different `replicate`
positions are copies of each other (hybrid sharding: gather within a node, sum across nodes).  By default `shard` is all
of it.

torch names a group after its ranks and the number of groups its process has, so all ranks must create equally many, in
the same order.  These do: along an axis every rank's group has the same pattern.

`Axis` is what layers get to see.  An axis of size one has no group, and every collective in `collectives` returns at
once for it: one process runs the same code as 2,048.
"""

from __future__ import annotations

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
    checked: bool = False        # collectives compare what the ranks bring before they run

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
    shard: Axis
    replicate: Axis
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
            for name in ("tensor", "context", "pipeline", "data", "gradient", "shard", "replicate", "world")}
    return Mesh(Topology(), 0, torch.device(device), **axes)


def meta_mesh(topology: Topology, rank: int) -> Mesh:
    """The mesh of one rank of a job that is not running: no groups, and the device of tensors without memory.

    What is built on it has the shapes, boxes and program of that rank, and cannot compute or communicate.
    """
    axes = {name: Axis(name, ranks, ranks.index(rank), None) for name, ranks in topology.axes_of(rank).items()}
    return Mesh(topology, rank, torch.device("meta"), **axes)


Groups = dict[tuple[int, ...], dist.ProcessGroup]


def build_mesh(topology: Topology, device: torch.device | str, timeout_seconds: float = 600.0,
               groups: Groups | None = None, checked: bool = False) -> Mesh:
    """Creates this rank's process groups.  Every rank of the default group must call it with the same topology.

    Each rank creates only the groups that it belongs to (`use_local_synchronization`), so the cost does not grow with
    the size of the job; axes with the same ranks share one group.

    Args:
        topology: the layout; its world size must be the job's.
        device: where this rank computes.
        timeout_seconds: how long a collective waits for a peer before it fails.
        groups: this rank's groups by their ranks, when a process builds several meshes; new ones are added.
        checked: every collective first compares operation, shape and dtype over its ranks; slow, for debugging.

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
    known: Groups = {} if groups is None else groups
    if world_size > 1 and dist.group.WORLD is not None:
        known.setdefault(tuple(range(world_size)), dist.group.WORLD)

    def axis(name: str, ranks: tuple[int, ...]) -> Axis:
        if len(ranks) > 1 and ranks not in known:
            known[ranks] = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)
        return Axis(name, ranks, ranks.index(rank), known.get(ranks), checked)

    return Mesh(topology, rank, torch.device(device),
                **{name: axis(name, ranks) for name, ranks in topology.axes_of(rank).items()})
