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

from engine.config import Config
from engine.errors import ConfigError
from engine.schedules.table import recipe

AXES = ("pipeline", "data", "context", "tensor")


@dataclass(frozen=True)
class Topology:
    """Degrees of the four axes; `world_size` is their product.

    Attributes:
        shard: how many of the data × context ranks share one copy of the ZeRO state; 0 means all of them.
        tied: the first and the last stage hold copies of one parameter, whose gradients they sum up.
        copies: so many tensor ranks share a key-value head, and hold copies of it.
    """

    pipeline: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1
    shard: int = 0
    tied: bool = False
    copies: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise ConfigError(f"parallel.{axis} is {getattr(self, axis)}; a parallel degree is at least 1")

    @staticmethod
    def of(config: Config) -> Topology:
        """The topology a resolved configuration asks for.

        Where the chunks lie in a V, the first and the last are on one stage, which has the tied parameter once.
        """
        parallel = config.parallel
        return Topology(parallel.pipeline, parallel.data_size, parallel.context, parallel.tensor, parallel.zero_shard,
                        config.model.tie_embeddings and not recipe(parallel.schedule).v_shaped,
                        max(1, parallel.tensor // config.model.num_kv_heads))

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

    def groups(self) -> dict[str, np.ndarray]:
        """All groups of every direction, one per row `[groups, ranks]`; see `mesh` for the names.

        Every rank is in one row of each, but for `ends`: the stages between are in none.
        """
        ranks = np.arange(self.world_size).reshape(self.shape)

        def lines(*axes: str) -> np.ndarray:
            along = [AXES.index(axis) for axis in axes]
            others = [dim for dim in range(len(AXES)) if dim not in along]
            return ranks.transpose(*others, *along).reshape(-1, prod(self.shape[dim] for dim in along))

        gradient, pipeline = lines("data", "context"), lines("pipeline")
        size = self.shard or gradient.shape[1]
        copies = gradient.shape[1] // size
        return {"tensor": lines("tensor"), "context": lines("context"), "pipeline": pipeline, "data": lines("data"),
                "gradient": gradient, "shard": gradient.reshape(-1, size),
                "replicate": gradient.reshape(-1, copies, size).swapaxes(1, 2).reshape(-1, copies),
                "ends": pipeline[:, [0, -1]] if self.tied and self.pipeline > 1 else lines(),
                "copies": lines("tensor").reshape(-1, self.copies), "world": ranks.reshape(1, -1)}

    def axes_of(self, rank: int) -> dict[str, tuple[int, ...]]:
        """The ranks that `rank` works with in each direction, itself included; see `mesh` for the names."""
        rows = {name: groups[(groups == rank).any(axis=1)] for name, groups in self.groups().items()}
        return {name: tuple(map(int, found[0])) if len(found) else (rank,) for name, found in rows.items()}
