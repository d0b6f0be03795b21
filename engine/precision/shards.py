"""Casts of weights that are cut into shards: every rank casts its shard of them, and casts are what is gathered.

    masters (fp32)   this rank's shard of w₀ w₁ w₂ …                          kept
    casts (FP8)      the same shard, for each way to cast it                   kept; made once a step
    scales (fp32)    of the whole weights                                      kept; few
    whole (FP8)      gathered around each use, in the way that a pass needs    a byte for each number

A shard is a flat range, which ends where it does: in a row, in a block of 128.  What it holds of a weight is some boxes
(`engine.distributed.boxes`).  Each is cut along the weight's own blocks, the largest value in each is one over all
shards and over the tensor ranks that divide the block, and with it every rank has all scales.  So casts do not depend
on where shards end: what is gathered is, bit for bit, the cast of the gathered weight.

A forward pass gathers one byte for each number and a backward pass one, also where a recipe casts in two ways: each
pass takes the one it multiplies with.  A layer that is recomputed as a whole needs both in its backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from engine.distributed.boxes import Box, flat_range_boxes
from engine.distributed.collectives import Work, all_reduce
from engine.distributed.mesh import Mesh
from engine.kernels.blocks import Block, grid, ways
from engine.kernels.fp8 import E4M3, Scaled, amax_of, narrow, scales_of
from engine.precision.fp8 import Fp8Gemms


@dataclass(frozen=True)
class Place:
    """Where a weight [rows, columns] begins in the vector that is cut, and whose it is."""

    gemms: Fp8Gemms
    offset: int
    rows: int
    columns: int


@dataclass(frozen=True)
class _Part:
    """What a shard holds of a weight: a box of it, cast in blocks of one kind.

    Attributes:
        there: of the shard.
        front: rows and columns of its first blocks that belong to other boxes.
        scales: of its blocks.
    """

    way: int
    there: slice
    box: Box
    block: Block
    front: tuple[int, int]
    scales: Tensor

    def of(self, shard: Tensor, dtype: torch.dtype) -> Tensor:
        """The weights as they are cast: in the compute dtype, beginning with a whole block."""
        values = shard[self.there].view(self.box.size).to(dtype)
        return F.pad(values, (self.front[1], 0, self.front[0], 0)) if any(self.front) else values


class ShardedCasts:
    """The casts of some weights that lie end to end in a vector, of which this rank has a shard.

    Attributes:
        shards: FP8, of each way to cast.
        wholes: room for all shards, of each way.
        scales: fp32, all of them.
    """

    def __init__(self, places: Sequence[Place], shard: slice, size: int, mesh: Mesh, dtype: torch.dtype) -> None:
        """`dtype`: in which the weights would be gathered otherwise; lets every `Place.gemms` use the casts."""
        blocks = ways(places[0].gemms.recipe.weight_block)
        self._mesh, self._dtype = mesh, dtype
        self._again = any(place.gemms.recomputed for place in places)
        self.shards = [torch.zeros(shard.stop - shard.start, dtype=torch.uint8, device=mesh.device).view(E4M3)
                       for _ in blocks]
        self.wholes = [torch.empty(size, dtype=torch.uint8, device=mesh.device).view(E4M3) for _ in blocks]
        # What tensor ranks divide comes first, to be agreed on in one message.
        order = sorted(((i, way) for i in range(len(places)) for way in range(len(blocks))),
                       key=lambda one: not places[one[0]].gemms.divided(blocks[one[1]]))
        counts = [prod(grid(blocks[way], places[i].rows, places[i].columns)) for i, way in order]
        self._divided = sum(count for count, (i, way) in zip(counts, order, strict=True)
                            if places[i].gemms.divided(blocks[way]))
        self.scales = torch.zeros(sum(counts), device=mesh.device)
        grids = {one: part.view(grid(blocks[one[1]], places[one[0]].rows, places[one[0]].columns))
                 for one, part in zip(order, self.scales.split(counts), strict=True)}
        self._parts = [part for (i, way), scales in grids.items()
                       for part in _parts_of(places[i], shard, way, blocks[way], scales)]
        for i, place in enumerate(places):
            there = slice(place.offset, place.offset + place.rows * place.columns)
            casts = [Scaled(whole[there].view(place.rows, place.columns), grids[i, way], blocks[way])
                     for way, whole in enumerate(self.wholes)]
            place.gemms.gathered = casts[0], casts[-1].mT

    def needed(self, backward: bool) -> set[int]:
        """The ways of which a pass needs all shards."""
        return {len(self.wholes) - 1} | ({0} if self._again else set()) if backward else {0}

    def start_cast(self, masters: Tensor) -> Work:
        """Casts what this rank holds of the weights; done when waited for."""
        self.scales.zero_()
        for part in self._parts:
            found = amax_of(part.of(masters, self._dtype), part.block)
            part.scales.copy_(torch.maximum(part.scales, found))
        if self._divided:
            all_reduce(self.scales[: self._divided], self._mesh.tensor, op=dist.ReduceOp.MAX)
        agreeing = all_reduce(self.scales, self._mesh.shard, op=dist.ReduceOp.MAX, asynchronous=True)
        return _Cast(self, masters, agreeing)

    def finish_cast(self, masters: Tensor) -> None:
        """With the largest values in place of scales."""
        self.scales.copy_(scales_of(self.scales, E4M3))
        for part in self._parts:
            cast = narrow(part.of(masters, self._dtype), part.scales, part.block, E4M3).values
            own = cast[part.front[0] :, part.front[1] :].contiguous()
            self.shards[part.way].view(torch.uint8)[part.there] = own.view(torch.uint8).flatten()


class _Cast:
    """The handle of a cast under way."""

    def __init__(self, casts: ShardedCasts, masters: Tensor, agreeing: Work) -> None:
        self._casts, self._masters, self._agreeing = casts, masters, agreeing

    def wait(self) -> None:
        """Returns when the shard is cast."""
        self._agreeing.wait()
        self._casts.finish_cast(self._masters)


def _parts_of(place: Place, shard: slice, way: int, block: Block, scales: Tensor) -> Iterator[_Part]:
    start, stop = shard.start - place.offset, shard.stop - place.offset
    for box, position in flat_range_boxes(Box.whole((place.rows, place.columns)), start, stop):
        first = max(start, 0) + place.offset - shard.start + position
        front = tuple(0 if part is None else at % part for at, part in zip(box.offset, block, strict=True))
        held = [slice(None) if part is None else slice(at // part, -(-(at + size) // part))
                for at, size, part in zip(box.offset, box.size, block, strict=True)]
        yield _Part(way, slice(first, first + box.num_elements), box, block, (front[0], front[1]),
                    scales[held[0], held[1]])
