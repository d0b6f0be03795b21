"""The state of a small Llama under any layout, cut as the engine cuts it, but without the engine.

Global values are a function of the tensor's name, so whoever loads any part of it knows what to expect.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

from engine.checkpoint.plan import announce, assign
from engine.checkpoint.shard import Entry
from engine.distributed.boxes import Box, flat_range_boxes
from engine.distributed.pieces import Piece

HIDDEN, VOCAB, FFN, GROUPS, LAYERS = 12, 26, 20, 4, 4
PREFIXES = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")


@dataclass(frozen=True)
class Layout:
    """Degrees of a layout; ranks count tensor innermost, then data, then pipeline."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    data: int = 1
    zero: int = 1

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        return f"t{self.tensor}p{self.pipeline}v{self.virtual}d{self.data}z{self.zero}"


def parameters() -> dict[str, tuple[tuple[int, ...], int | None]]:
    """Shape, and the dimension that tensor parallelism cuts."""
    layer: dict[str, tuple[tuple[int, ...], int | None]] = {
        "input_layernorm.weight": ((HIDDEN,), None),
        "self_attention.linear_qkv.weight": ((GROUPS, 3, 2, HIDDEN), 0),
        "self_attention.linear_proj.weight": ((HIDDEN, GROUPS * 2), 1),
        "mlp.linear_fc1.weight": ((2, FFN, HIDDEN), 1),
        "mlp.linear_fc2.weight": ((HIDDEN, FFN), 1)}
    found: dict[str, tuple[tuple[int, ...], int | None]] = {"embedding.weight": ((VOCAB, HIDDEN), 0)}
    for index in range(LAYERS):
        found |= {f"layers.{index}.{name}": spec for name, spec in layer.items()}
    return found | {"final_layernorm.weight": ((HIDDEN,), None), "output_layer.weight": ((VOCAB, HIDDEN), 0)}


def value(key: str, shape: Sequence[int]) -> torch.Tensor:
    """The global tensor `key`."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))


def _stage_of(name: str, layout: Layout) -> int:
    """Pipeline stage; with virtual stages, chunk c lives on stage c mod pipeline."""
    if name.startswith("embedding"):
        return 0
    if not name.startswith("layers."):
        return layout.pipeline - 1
    chunks = layout.pipeline * layout.virtual
    return int(name.split(".")[1]) * chunks // LAYERS % layout.pipeline


def held(layout: Layout, rank: int) -> list[tuple[str, tuple[int, ...], Box]]:
    """Key, global shape and box of everything that a rank holds."""
    tensor, data, stage = (rank % layout.tensor, rank // layout.tensor % layout.data,
                           rank // (layout.tensor * layout.data))
    slices = []
    for name, (shape, dim) in parameters().items():
        if _stage_of(name, layout) == stage:
            box = Box.whole(shape)
            if dim is not None:
                width = -(-shape[dim] // layout.tensor)
                start = min(tensor * width, shape[dim])
                box = box.narrow(dim, start, min(width, shape[dim] - start))
            slices.append((name, shape, box))
    if layout.zero:
        slices = _shard(slices, layout.data, data)
    return [(f"{prefix}.{name}", shape, box) for prefix, (name, shape, box) in product(PREFIXES, slices)]


def _shard(slices: list[tuple[str, tuple[int, ...], Box]], parts: int, index: int,
           ) -> list[tuple[str, tuple[int, ...], Box]]:
    """A flat bucket of all slices, cut into equal ranges."""
    total = sum(box.num_elements for _, _, box in slices)
    width, position, found = -(-total // parts), 0, []
    for name, shape, box in slices:
        start, stop = index * width - position, (index + 1) * width - position
        found += [(name, shape, part) for part, _ in flat_range_boxes(box, start, stop)]
        position += box.num_elements
    return found


def pieces_of(layout: Layout, rank: int, empty: bool = False) -> list[Piece]:
    """What a rank holds, with its values, or with NaN in their place to be loaded into."""
    return [Piece(key, shape, box, torch.full(box.size, torch.nan) if empty else value(key, shape)[box.slices])
            for key, shape, box in held(layout, rank)]


def files_of(layout: Layout) -> list[list[Entry]]:
    """What each rank's file holds, by the same division of labour as a real save."""
    everyone = [pieces_of(layout, rank) for rank in range(layout.world_size)]
    plan = assign([announce(pieces) for pieces in everyone])
    return [[Entry(p.key, p.global_shape, p.box, p.tensor.dtype) for p in (pieces[i] for i in mine)]
            for pieces, mine in zip(everyone, plan, strict=True)]


def assert_loaded(pieces: Sequence[Piece]) -> None:
    """Every element is, bit for bit, what it must be."""
    for piece in pieces:
        assert torch.equal(piece.tensor, value(piece.key, piece.global_shape)[piece.box.slices]), piece.key
