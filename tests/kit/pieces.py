"""The state of a small Llama under any layout, cut as the engine cuts it, but without the engine.

Global values are a function of the tensor's name, so whoever loads any part of it knows what to expect.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

from engine.checkpoint.plan import divide
from engine.checkpoint.shard import Entry, entry_of
from engine.distributed.announce import catalogue_of, ranges_of
from engine.distributed.boxes import Box, flat_range_boxes
from engine.distributed.ledger import Ledger
from engine.distributed.pieces import Piece

HIDDEN, VOCAB, FFN, GROUPS, LAYERS = 12, 26, 20, 4, 4
PREFIXES = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")


Held = tuple[str, tuple[int, ...], Box, int, int]          # key, global shape, block, and the range of it


@dataclass(frozen=True)
class Layout:
    """Degrees of a layout; ranks count tensor innermost, then data, then pipeline.

    State is sharded over data for any `zero` but 0: cut into boxes (1), or into flat ranges (2), as the engine does.
    """

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


def held(layout: Layout, rank: int) -> list[Held]:
    """Everything that a rank holds."""
    tensor, data, stage = (rank % layout.tensor, rank // layout.tensor % layout.data,
                           rank // (layout.tensor * layout.data))
    slices: list[Held] = []
    for name, (shape, dim) in parameters().items():
        if _stage_of(name, layout) == stage:
            box = Box.whole(shape)
            if dim is not None:
                width = -(-shape[dim] // layout.tensor)
                start = min(tensor * width, shape[dim])
                box = box.narrow(dim, start, min(width, shape[dim] - start))
            slices.append((name, shape, box, 0, box.num_elements))
    if layout.zero:
        slices = _shard(slices, layout.data, data, as_boxes=layout.zero == 1)
    return [(f"{prefix}.{name}", *rest) for prefix, (name, *rest) in product(PREFIXES, slices)]


def _shard(slices: list[Held], parts: int, index: int, as_boxes: bool) -> list[Held]:
    """A flat bucket of all slices, cut into equal ranges; each a range of its slice, or the boxes that make it up."""
    total = sum(box.num_elements for _, _, box, _, _ in slices)
    width, position, found = -(-total // parts), 0, list[Held]()
    for name, shape, box, _, whole in slices:
        start, stop = (min(max(edge * width - position, 0), whole) for edge in (index, index + 1))
        if as_boxes:
            found += [(name, shape, part, 0, part.num_elements) for part, _ in flat_range_boxes(box, start, stop)]
        else:
            found.append((name, shape, box, start, stop))
        position += whole
    return found


def pieces_of(layout: Layout, rank: int, empty: bool = False) -> list[Piece]:
    """What a rank holds, with its values, or with NaN in their place to be loaded into."""
    pieces = []
    for key, shape, box, start, stop in held(layout, rank):
        values = value(key, shape)[box.slices]
        if (start, stop) != (0, box.num_elements):
            values = values.reshape(-1)[start:stop]
        pieces.append(Piece(key, shape, box, torch.full_like(values, torch.nan) if empty else values, start))
    return pieces


def files_of(layout: Layout) -> list[list[Entry]]:
    """What each rank's file holds, by the same division of labour as a real save."""
    everyone = [pieces_of(layout, rank) for rank in range(layout.world_size)]
    division = divide(ledger_of_ranks(everyone))
    return [[entry_of(pieces[i]) for i in division.of(rank)] for rank, pieces in enumerate(everyone)]


def ledger_of_ranks(everyone: Sequence[Sequence[Piece]]) -> Ledger:
    """What all ranks would have told each other."""
    return Ledger.of([catalogue_of(pieces) for pieces in everyone],
                     [(rank, ranges_of(pieces)) for rank, pieces in enumerate(everyone)])


def fetch(entry: Entry) -> torch.Tensor:
    """The values of what a file is to hold."""
    values = value(entry.key, entry.global_shape)[entry.box.slices]
    return values if values.shape == entry.size else values.reshape(-1)[entry.start : entry.stop]


def assert_loaded(pieces: Sequence[Piece]) -> None:
    """Every element is, bit for bit, what it must be."""
    for piece in pieces:
        for box, values in piece.parts():
            assert torch.equal(values, value(piece.key, piece.global_shape)[box.slices]), piece.key
