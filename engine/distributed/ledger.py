"""The ledger: who holds what of which global tensor.  Ranks of a layout, or files of a checkpoint.

    block     a box of a global tensor, as some layout cuts it
    tile      a flat range of a block, in the hands of one holder or of several with copies
    ledger    all tiles of all blocks of all tensors

It answers the one question that moving state asks: *which tiles does this box overlap, and where?*  Loading a
checkpoint asks it of the manifest; moving live weights asks it of the two layouts; a save asks which tiles have copies,
to write each once.

A ledger of 2,048 ranks has a million tiles, so it is a few integer columns, sorted by block and start.  It is made from
catalogues, lists of blocks that many holders share, and from the range that each holder has of each block of its
catalogue (`announce` is how ranks tell each other).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from math import prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine.distributed.boxes import Box, flat_position, flat_range_boxes, subtract

Integers = npt.NDArray[np.int64]


class Block(NamedTuple):
    """A box of a global tensor."""

    key: str
    dtype: str                    # as torch writes it, without `torch.`
    shape: tuple[int, ...]
    box: Box

    @property
    def num_elements(self) -> int:
        return self.box.num_elements


Catalogue = Sequence[Block]


class Ledger:
    """Tiles by block and start.

    Attributes:
        blocks: distinct, sorted.
        block, start, stop: columns, a row per tile.
        first: tile t is held by `holders[first[t] : first[t + 1]]`.
        place: for each entry of `holders`, the number of the tile in that holder's own list.
    """

    def __init__(self, blocks: Sequence[Block], block: Integers, start: Integers, stop: Integers, first: Integers,
                 holders: Integers, place: Integers) -> None:
        self.blocks, self.block, self.start, self.stop = blocks, block, start, stop
        self.first, self.holders, self.place = first, holders, place

    @staticmethod
    def of(catalogues: Sequence[Catalogue], held: Sequence[tuple[int, Integers]]) -> Ledger:
        """From what each holder has.

        Args:
            catalogues: lists of blocks.
            held: by holder, the number of its catalogue and its range [start, stop) of each of those blocks.

        Raises:
            ValueError: holders disagree about a tensor's shape or type.
        """
        blocks = sorted({block for catalogue in catalogues for block in catalogue})
        _require_one_kind(blocks)
        numbers = {block: number for number, block in enumerate(blocks)}
        columns: list[tuple[Integers, ...]] = [(np.empty(0, np.int64),) * 5]
        for which, catalogue in enumerate(catalogues):
            members = np.array([holder for holder, (its, _) in enumerate(held) if its == which], np.int64)
            if not len(members):
                continue
            ranges = np.stack([held[holder][1] for holder in members]).swapaxes(0, 1)      # [blocks, members, 2]
            place, member = np.nonzero(ranges[..., 1] > ranges[..., 0])
            own = np.array([numbers[block] for block in catalogue], np.int64)
            columns.append((own[place], *ranges[place, member].T, members[member], place))
        block, start, stop, holders, place = (np.concatenate(column) for column in zip(*columns, strict=True))
        order, new = _sorted(block, start, stop)
        first = np.flatnonzero(new)
        tiles = order[first]
        return Ledger(blocks, block[tiles], start[tiles], stop[tiles], np.r_[first, len(block)], holders[order],
                      place[order])

    def __len__(self) -> int:
        return len(self.block)

    @cached_property
    def keys(self) -> dict[str, range]:
        """The numbers of each tensor's blocks."""
        found: dict[str, range] = {}
        for number, block in enumerate(self.blocks):
            found[block.key] = range(found[block.key].start if block.key in found else number, number + 1)
        return found

    @cached_property
    def itemsizes(self) -> Integers:
        """Bytes of an element, by block."""
        return np.array([_itemsize(block.dtype) for block in self.blocks], np.int64)

    @property
    def num_bytes(self) -> Integers:
        """By tile."""
        return (self.stop - self.start) * (self.itemsizes[self.block] if len(self) else 1)

    def kind(self, key: str) -> tuple[str, tuple[int, ...]]:
        """Type and global shape of a tensor."""
        block = self.blocks[self.keys[key].start]
        return block.dtype, block.shape

    def tiles_of(self, key: str) -> range:
        """The numbers of a tensor's tiles."""
        numbers = self.keys[key]
        return range(*map(int, np.searchsorted(self.block, (numbers.start, numbers.stop))))

    def holders_of(self, tile: int) -> Integers:
        return self.holders[self.first[tile] : self.first[tile + 1]]

    def boxes(self, tile: int) -> list[Box]:
        """The boxes that a tile is made of."""
        block = self.blocks[self.block[tile]]
        return [box for box, _ in flat_range_boxes(block.box, int(self.start[tile]), int(self.stop[tile]))]

    def overlapping(self, key: str, box: Box) -> Iterator[tuple[int, Box]]:
        """Where the elements of `box` are: tiles, and boxes of them, which are in `box`.

        An element that several tiles hold, of blocks that overlap, comes several times.
        """
        for number in self._touching(key, box):
            block = self.blocks[number]
            region = box.intersect(block.box)
            if region is None:
                continue
            last = Box(tuple(o + s - 1 for o, s in zip(region.offset, region.size, strict=True)),
                       (1,) * len(region.size))
            low, high = flat_position(region, block.box), flat_position(last, block.box) + 1
            tiles = slice(*map(int, np.searchsorted(self.block, (number, number + 1))))
            there = (self.start[tiles] < high) & (self.stop[tiles] > low)
            for tile in np.flatnonzero(there) + tiles.start:
                for part in self.boxes(int(tile)):
                    overlap = part.intersect(region)
                    if overlap is not None:
                        yield int(tile), overlap

    def _touching(self, key: str, box: Box) -> Iterator[int]:
        """Numbers of the blocks of a tensor that overlap `box`; there may be thousands."""
        numbers = self.keys[key]
        starts, stops = self._corners(key)
        low = np.array(box.offset, np.int64)
        overlap = (np.maximum(starts, low) < np.minimum(stops, low + np.array(box.size, np.int64))).all(axis=1)
        return (numbers.start + int(index) for index in np.flatnonzero(overlap))

    def _corners(self, key: str) -> tuple[Integers, Integers]:
        if key not in self._known_corners:
            boxes = [self.blocks[number].box for number in self.keys[key]]
            shape = (len(boxes), len(self.kind(key)[1]))
            offsets = np.array([box.offset for box in boxes], np.int64).reshape(shape)
            self._known_corners[key] = offsets, offsets + np.array([b.size for b in boxes], np.int64).reshape(shape)
        return self._known_corners[key]

    @cached_property
    def _known_corners(self) -> dict[str, tuple[Integers, Integers]]:
        return {}

    def elements_held(self) -> dict[str, int]:
        """How many elements of each tensor the tiles hold, copies counted once."""
        sizes = np.zeros(len(self.blocks) + 1, np.int64)
        np.add.at(sizes, self.block, self.stop - self.start)
        return {key: int(sizes[numbers.start : numbers.stop].sum()) for key, numbers in self.keys.items()}

    def require_all(self, who: str) -> None:
        """
        Raises:
            ValueError: a part of a tensor is held by nobody; `who` they are.
        """
        for key, held in self.elements_held().items():
            total = prod(self.kind(key)[1])
            if held < total:
                raise ValueError(f"{key}: {who} together hold {held:,} of its {total:,} elements")


def cover(ledger: Ledger, key: str, box: Box) -> tuple[list[tuple[int, Box]], list[Box]]:
    """Where to take each element of `box` from, once; and what of it is nowhere."""
    found: list[tuple[int, Box]] = []
    left = [box]
    for tile, overlap in ledger.overlapping(key, box):
        still_left: list[Box] = []
        for part in left:
            region = part.intersect(overlap)
            if region is None:
                still_left.append(part)
            else:
                found.append((tile, region))
                still_left += subtract(part, region)
        left = still_left
    return found, left


def _sorted(block: Integers, start: Integers, stop: Integers) -> tuple[Integers, npt.NDArray[np.bool_]]:
    """The order by block, start and stop, and which of the rows in that order differ from the one before.

    Quick where the order is almost there, as that of columns by catalogue is, and starts tell rows apart.
    """
    if len(block) and int(start.max()) < 1 << 42 and int(block.max()) < 1 << 21:
        key = block << 42 | start
        order = np.argsort(key, kind="stable")
        key, end = key[order], stop[order]
        new = np.r_[True, key[1:] != key[:-1]]
        if not (~new[1:] & (end[1:] != end[:-1])).any():
            return order, new
    order = np.lexsort((stop, start, block))
    rows = np.stack((block[order], start[order], stop[order]))
    return order, np.r_[True, (rows[:, 1:] != rows[:, :-1]).any(axis=0)][: len(block)]


def _require_one_kind(blocks: Sequence[Block]) -> None:
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for block in blocks:
        kind = block.dtype, block.shape
        if kinds.setdefault(block.key, kind) != kind:
            raise ValueError(f"{block.key} is {kinds[block.key]} in one place and {kind} in another")


def _itemsize(dtype: str) -> int:
    """Bytes of a torch type by its name: `bfloat16`, `float8_e4m3fn`, `int64`, `bool`."""
    bits = "".join(c for c in dtype.partition("_")[0] if c.isdigit())
    return int(bits) // 8 if bits else 1
