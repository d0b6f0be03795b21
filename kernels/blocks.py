"""Which numbers of a weight share a scale in FP8 (`engine.kernels.fp8`), and what casts take: known without torch.

A weight W [out, in] is a factor twice: of y = x·Wᵀ, whose sum runs along its rows, and of dx = dy·W, along its columns.
Where a block is square one cast serves both; else there are two *ways* to cast it, the second with the block turned.
"""

from __future__ import annotations

from math import prod

# Rows and columns that share a scale; None: all of them.
Block = tuple[int | None, int | None]

WEIGHT_BLOCKS: dict[str, Block] = {
    "tensorwise": (None, None), "rowwise": (1, None), "blockwise": (128, 128), "mxfp8": (1, 32)}
MANY = 1024                # numbers under one scale, from which on every rank may keep all scales of a weight


def ways(block: Block) -> tuple[Block, ...]:
    """The blocks of W in which it is cast, for the forward product and for the input gradient."""
    return (block,) if block[0] == block[1] else (block, block[::-1])


def has_few_scales(block: Block) -> bool:
    """Whether scales are so few that they weigh nothing beside the values."""
    return None in block or prod(part or 1 for part in block) >= MANY


def grid(block: Block, rows: int, columns: int) -> tuple[int, int]:
    """How many blocks there are along each dimension."""
    return 1 if block[0] is None else -(-rows // block[0]), 1 if block[1] is None else -(-columns // block[1])


def num_scales(block: Block, rows: int, columns: int) -> int:
    """Of all ways to cast a weight."""
    return sum(prod(grid(way, rows, columns)) for way in ways(block))


def cast_bytes(block: Block, rows: int, columns: int) -> int:
    """All casts of a weight: a byte for each number and way, and fp32 scales."""
    return len(ways(block)) * rows * columns + 4 * num_scales(block, rows, columns)
