"""The mesh: a topology with its process groups.  `Job` is the only place that creates groups.

A rank needs one group per axis, and some that combine axes or take part of one:

    gradient   data × context    ranks that hold the same parameters and different tokens: gradients are summed here,
                                 and ZeRO shards over it
    ends       first and last    the two stages of a pipeline that hold copies of a tied embedding; a stage between is
               stage             alone
    copies     part of tensor    ranks that hold copies of keys and values, of which there are fewer than ranks
    world      all of the mesh   what everybody must know alike, as CPU tensors: it never touches a GPU

`gradient` itself may be split for ZeRO: state is sharded along `shard`, and the shards of different `replicate`
positions are copies of each other (hybrid sharding: gather within a node, sum across nodes).  By default `shard` is all
of it.

A mesh lies on all ranks of the job or on a range of them, so several meshes can be disjoint, overlap or be equal.
Their groups would meet wrongly if each rank created only its own: torch names a group after the number of groups that
its process has seen, which then differs between the ranks of one group.  So *every* rank of the job walks through *all*
groups of every mesh, in one order, and its counter with it; where it is no member that costs a few microseconds and
opens nothing.  Axes with the same ranks share one group, within a mesh and between meshes.

On a GPU the axes' groups speak NCCL only, `world` gloo only: a group that has both would open a full mesh of sockets
for messages that it never carries.

`Axis` is what layers get to see.  An axis of size one has no group, and every collective in `collectives` returns at
once for it: one process runs the same code as 2,048.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from engine.distributed.topology import Topology
from engine.distributed.waits import NOT_ON_A_GPU, Waits
from engine.errors import RequestError


@dataclass(frozen=True)
class Axis:
    """One direction of the mesh as seen from one rank.

    Attributes:
        ranks: their numbers in the job.
        index: this rank's place among them.
        checked: collectives compare what the ranks bring before they run.
        waits: counts the time in which this rank waits for others; None: nobody does.
        size: how many they are; a field, since every collective of every layer asks.
    """

    name: str
    ranks: tuple[int, ...]
    index: int
    group: dist.ProcessGroup | None
    checked: bool = False
    waits: Waits | None = field(default=None, compare=False)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", len(self.ranks))

    @staticmethod
    def single(name: str, rank: int = 0) -> Axis:
        """The axis of size one."""
        return Axis(name, (rank,), 0, None)


@dataclass(frozen=True)
class Mesh:
    """This rank's place among all of the mesh; `rank` counts from the mesh's first."""

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
    ends: Axis
    copies: Axis
    world: Axis

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline.index == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline.index == self.pipeline.size - 1


def single_mesh(device: torch.device | str = "cpu") -> Mesh:
    """The mesh of one process; needs no `torch.distributed`."""
    return Mesh(Topology(), 0, torch.device(device), **{name: Axis.single(name) for name in Topology().axes_of(0)})


def meta_mesh(topology: Topology, rank: int) -> Mesh:
    """The mesh of one rank of a job that is not running: no groups, and the device of tensors without memory.

    What is built on it has the shapes, boxes and program of that rank, and cannot compute or communicate.
    """
    axes = {name: Axis(name, ranks, ranks.index(rank), None) for name, ranks in topology.axes_of(rank).items()}
    return Mesh(topology, rank, torch.device("meta"), **axes)


class Job:
    """The job as one of its processes sees it."""

    def __init__(self, device: torch.device | str, timeout_seconds: float = 600.0, checked: bool = False) -> None:
        """The default group must be there; without it the job is this process alone.

        Args:
            device: where this rank computes.
            timeout_seconds: how long a collective waits for a peer before it fails.
            checked: every collective first compares operation, shape and dtype over its ranks; slow, for debugging.
        """
        self.device, self.checked = torch.device(device), checked
        self.waits = Waits(self.device)
        self._timeout = timedelta(seconds=timeout_seconds)
        self._groups: dict[tuple[str | None, tuple[int, ...]], dist.ProcessGroup | None] = {}
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if self.size > 1:
            for name in ("tensor", "world"):
                self._groups[self._backend(name), tuple(range(self.size))] = dist.group.WORLD

    @property
    def world(self) -> Axis:
        """All ranks; for CPU tensors."""
        return self._axis("world", tuple(range(self.size)))

    def mesh(self, topology: Topology) -> Mesh:
        """The mesh over all ranks.  Every rank of the job must call this, with the same topology.

        Raises:
            RequestError: the job has another number of processes than the topology.
        """
        if topology.world_size != self.size:
            raise RequestError(f"the layout needs {topology.world_size} processes, the job has {self.size}; "
                               "a node that did not join, or a wrong --nproc-per-node")
        mesh = self.mesh_on(range(self.size), topology)
        assert mesh is not None
        return mesh

    def mesh_on(self, ranks: range, topology: Topology) -> Mesh | None:
        """The mesh over a range of ranks; None on the others.  *Every* rank of the job must call this, in one order.

        Raises:
            RequestError: the job does not have these ranks, or the topology needs another number.
        """
        if not 0 <= ranks.start < ranks.stop <= self.size or ranks.step != 1 or len(ranks) != topology.world_size:
            raise RequestError(f"a layout of {topology.world_size} processes cannot lie on ranks {ranks.start} to "
                               f"{ranks.stop - 1} of a job of {self.size}")
        for name, groups in topology.groups().items():
            for row in (groups + ranks.start).tolist():
                self._create(name, tuple(row))
        if self.rank not in ranks:
            return None
        inner = self.rank - ranks.start
        axes = {name: self._axis(name, tuple(rank + ranks.start for rank in members))
                for name, members in topology.axes_of(inner).items()}
        return Mesh(topology, inner, self.device, **axes)

    def release(self) -> None:
        """Closes the groups of all meshes so far, none of which is used any more.  Every rank of the job calls this."""
        for key, group in [*self._groups.items()]:
            if group is not dist.group.WORLD:
                del self._groups[key]
                if group is not None:
                    dist.destroy_process_group(group)

    def _axis(self, name: str, ranks: tuple[int, ...]) -> Axis:
        waits = None if self.device.type == "cuda" and name in NOT_ON_A_GPU else self.waits
        return Axis(name, ranks, ranks.index(self.rank), self._groups.get((self._backend(name), ranks)), self.checked,
                    waits)

    def _create(self, name: str, ranks: tuple[int, ...]) -> None:
        """A step of the walk through all groups: creates this one where it is not there yet and has two members."""
        key = self._backend(name), ranks
        if len(ranks) > 1 and key not in self._groups:
            group = dist.new_group(list(ranks), timeout=self._timeout, backend=key[0], group_desc=name)
            self._groups[key] = group if self.rank in ranks else None

    def _backend(self, name: str) -> str | None:
        """What the groups of an axis speak; None: the same as the default group."""
        if self.device.type != "cuda":
            return None
        return "gloo" if name == "world" else "nccl"
