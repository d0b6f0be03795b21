"""Rank algebra: who is where, without starting a process.

The ranks of a job are the numbers `0 … world-1` laid out in a four-dimensional array

    ranks = arange(world).reshape(pipeline, data, context, tensor)

so a rank's coordinates are its indices, and the groups along an axis are the lines of the array in that direction.
`tensor` is innermost: tensor-parallel peers, which talk several times per layer, get neighbouring ranks and so share a
node; `pipeline`, which sends one activation per microbatch, is outermost and crosses nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from engine.config import ParallelConfig
from engine.errors import ConfigError

AXES = ("pipeline", "data", "context", "tensor")


@dataclass(frozen=True)
class Topology:
    """Degrees of the four axes; `world_size` is their product.

    `shard` says how many of the data × context ranks share one copy of the ZeRO state; 0 means all of them.
    """

    pipeline: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1
    shard: int = 0

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise ConfigError(f"parallel.{axis} is {getattr(self, axis)}; a parallel degree is at least 1")

    @staticmethod
    def of(parallel: ParallelConfig) -> Topology:
        """The topology a resolved configuration asks for."""
        return Topology(parallel.pipeline, parallel.data_size, parallel.context, parallel.tensor, parallel.zero_shard)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def world_size(self) -> int:
        return prod(self.shape)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Index of `rank` along every axis."""
        return {axis: int(i) for axis, i in zip(AXES, np.unravel_index(rank, self.shape), strict=True)}

    def rank(self, **coordinates: int) -> int:
        """The rank at these coordinates (an axis left out counts as 0)."""
        return int(np.ravel_multi_index(tuple(coordinates.get(axis, 0) for axis in AXES), self.shape))

    def group_of(self, rank: int, *axes: str) -> tuple[int, ...]:
        """The group along `axes` that contains `rank`."""
        mine = self.coordinates(rank)
        ranks = np.arange(self.world_size).reshape(self.shape)
        index = tuple(slice(None) if axis in axes else mine[axis] for axis in AXES)
        return tuple(int(r) for r in np.asarray(ranks[index]).reshape(-1))

    def axes_of(self, rank: int) -> dict[str, tuple[int, ...]]:
        """The ranks that `rank` works with in each direction, itself included; see `mesh` for the names."""
        axes = {axis: self.group_of(rank, axis) for axis in ("tensor", "context", "pipeline", "data")}
        gradient = self.group_of(rank, "data", "context")
        index, size = gradient.index(rank), self.shard or len(gradient)
        first = index - index % size
        return axes | {"gradient": gradient, "shard": gradient[first : first + size],
                       "replicate": gradient[index % size :: size], "world": tuple(range(self.world_size))}
