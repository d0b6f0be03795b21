"""ZeRO 3 with FP8: of the weights that FP8 products multiply with, casts are kept and gathered, and nothing wider.

    bucket of `engine.parallel.data.buckets`    kept 2 bytes of each number (bf16) and gathered 2
    this one                                    kept 1, or 2 where a recipe casts in two ways, and gathered 1 a pass

The masters are this rank's only wide copy.  The parameters are views of a buffer that has no memory: they have shape
and gradient, and `engine.precision.shards` the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.distributed.collectives import Work, all_gather_into
from engine.distributed.mesh import Mesh
from engine.parallel.data.buckets import Bucket, BucketKind
from engine.parallel.data.flat import allocate, free, is_free
from engine.precision.fp8 import Fp8Gemms
from engine.precision.shards import Place, ShardedCasts


class NarrowBucket(Bucket):
    """Weights of layers whose products are these; see the module docstring."""

    def __init__(self, kind: BucketKind, parameters: Sequence[tuple[nn.Parameter, int]], mesh: Mesh,
                 gemms: Mapping[nn.Parameter, Fp8Gemms], **options: Any) -> None:
        super().__init__(kind, parameters, mesh, **options)
        self.param_shard = self.master
        self.gemms = [gemms[entry.parameter] for entry in self.entries]
        places = [Place(own, entry.offset, entry.parameter.numel() // entry.parameter.shape[-1],
                        entry.parameter.shape[-1]) for own, entry in zip(self.gemms, self.entries, strict=True)]
        self.casts = ShardedCasts(places, self.shard, self.param_buffer.numel(), mesh, self.param_buffer.dtype)
        self._under_way: list[Work] = []
        self.release()

    def held(self) -> list[Tensor]:
        return [*self.casts.shards, self.casts.scales]

    def start_gather(self, backward: bool = False) -> None:
        needed = self.casts.needed(backward)
        for way, (whole, shard) in enumerate(zip(self.casts.wholes, self.casts.shards, strict=True)):
            if way not in needed and not is_free(whole):
                self.wait_gather()
                free(whole)
            if way in needed and is_free(whole):
                allocate(whole)
                if self.mesh.shard.size == 1:
                    whole.view(torch.uint8).copy_(shard.view(torch.uint8))
                self._under_way.append(
                    all_gather_into(whole.view(torch.uint8), shard.view(torch.uint8), self.mesh.shard))

    def wait_gather(self) -> None:
        while self._under_way:
            self._under_way.pop().wait()

    def release(self) -> None:
        self.wait_gather()
        for whole in self.casts.wholes:
            free(whole)

    def start_publish(self) -> Work:
        torch.autograd.graph.increment_version(self.param_buffer)
        self.release()
        return self.casts.start_cast(self.master)
