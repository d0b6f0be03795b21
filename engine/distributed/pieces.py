"""What a rank holds: boxes of global tensors.

A checkpoint knows nothing of models, optimizers or layouts.  It is given, by every rank, a list of pieces: "this is the
block `box` of the global tensor `key`".  Tensor slices, pipeline stages and ZeRO shards are all that, so one reader and
one writer serve every layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.distributed.boxes import Box

if TYPE_CHECKING:                       # names on disk and manifests are looked at where torch is not loaded yet
    import torch


@dataclass(frozen=True)
class Piece:
    """One block of a global tensor.

    Args:
        key: global name, the same in every layout, such as `optimizer.exp_avg.layers.3.mlp.linear_fc2.weight`.
        global_shape: shape of the whole tensor.
        box: which part of it this is.
        tensor: the values, of shape `box.size`; any strides, any device.
    """

    key: str
    global_shape: tuple[int, ...]
    box: Box
    tensor: torch.Tensor

    def __post_init__(self) -> None:
        if tuple(self.tensor.shape) != tuple(self.box.size):
            raise ValueError(f"{self.key}: a tensor of shape {tuple(self.tensor.shape)} cannot be the box {self.box}")
        if not inside(self.box, self.global_shape):
            raise ValueError(f"{self.key}: {self.box} leaves the tensor of shape {self.global_shape}")


def inside(box: Box, shape: tuple[int, ...]) -> bool:
    """Does `box` lie within a tensor of `shape`?"""
    return (len(box.offset) == len(box.size) == len(shape)
            and all(0 <= o and 0 <= s and o + s <= n for o, s, n in zip(box.offset, box.size, shape, strict=True)))


def tensor_name(key: str, box: Box) -> str:
    """Name of a box inside a file: `key[0:128,64:128]`, the index that cuts it out of the global tensor."""
    index = ",".join(f"{o}:{o + s}" for o, s in zip(box.offset, box.size, strict=True))
    return f"{key}[{index}]"
