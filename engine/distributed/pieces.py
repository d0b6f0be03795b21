"""What a rank holds: pieces of global tensors.

Whoever saves, loads or moves state knows nothing of models, optimizers or layouts.  Every rank gives it a list of
pieces: "this is the block `box` of the global tensor `key`", or a flat range of such a block.  Tensor slices and
pipeline stages are blocks, ZeRO shards are ranges of them, so one algorithm serves every layout.

A rank lists the blocks that its layout gives it also where its range of one is empty.  Ranks at the same place of the
model then list the same blocks, whatever their shard, and describing what everybody holds takes a list per place and a
few numbers per rank (`engine.distributed.ledger`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.distributed.boxes import Box, flat_position, flat_range_boxes, inside, strides_of

if TYPE_CHECKING:                       # names on disk and manifests are looked at where torch is not loaded yet
    import torch


@dataclass(frozen=True)
class Piece:
    """A block of a global tensor, or a flat range of one.

    Args:
        key: global name, the same in every layout, such as `optimizer.exp_avg.layers.3.mlp.linear_fc2.weight`.
        global_shape: shape of the whole tensor.
        box: the block.
        tensor: the values, on any device: all of the block, of shape `box.size` and with any strides, or
            one-dimensional and contiguous, its elements from `start` on in row-major order.
        start: where the range begins.
    """

    key: str
    global_shape: tuple[int, ...]
    box: Box
    tensor: torch.Tensor
    start: int = 0

    def __post_init__(self) -> None:
        if not inside(self.box, self.global_shape):
            raise ValueError(f"{self.key}: {self.box} leaves the tensor of shape {self.global_shape}")
        if not self.is_whole and (self.tensor.dim() != 1 or self.start < 0 or self.stop > self.box.num_elements):
            raise ValueError(f"{self.key}: a tensor of shape {tuple(self.tensor.shape)} cannot be the box {self.box}, "
                             f"nor its elements from {self.start:,} on")

    @property
    def stop(self) -> int:
        """Where the range ends."""
        return self.start + self.tensor.numel()

    @property
    def is_whole(self) -> bool:
        """Whether it is the block as a tensor, and no range of it."""
        return self.start == 0 and tuple(self.tensor.shape) == self.box.size

    def view(self, region: Box) -> torch.Tensor:
        """The values of a box that this piece holds all of, in place."""
        if self.is_whole:
            return self.tensor[region.within(self.box)]
        offset = self.tensor.storage_offset() + flat_position(region, self.box) - self.start
        return self.tensor.as_strided(region.size, strides_of(self.box.size), offset)

    def parts(self) -> Iterator[tuple[Box, torch.Tensor]]:
        """The boxes that it is made of, and their values in place; none where it is empty."""
        for box, _ in flat_range_boxes(self.box, self.start, self.stop):
            yield box, self.view(box)


def tensor_name(key: str, box: Box, start: int = 0, stop: int | None = None) -> str:
    """Name of a piece inside a file: `key[0:128,64:128]`, the index that cuts its block out of the global tensor.

    A range of the block has `{start:stop}` behind that.
    """
    index = ",".join(f"{o}:{o + s}" for o, s in zip(box.offset, box.size, strict=True))
    flat = "" if start == 0 and stop in (None, box.num_elements) else f"{{{start}:{stop}}}"
    return f"{key}[{index}]{flat}"
