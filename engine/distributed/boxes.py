"""Boxes: which part of a global tensor somebody holds.

A box is an axis-aligned block of a tensor, given by the offset of its first element and its size along every dimension.
What a rank holds of a parameter is a list of boxes:

* a tensor-parallel slice is one box (parameters are stored in shapes that make it so);
* a ZeRO shard is a flat range `[start, stop)` of such a slice, which is at most `2·d - 1` boxes for a d-dimensional
  tensor: an incomplete first row, the complete rows, an incomplete last row, and so on inward.

Moving state from any layout to any other is then one algorithm: intersect the boxes at the source with the boxes at the
destination and copy the overlaps (`ledger`).  This module is pure arithmetic and imports nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, order=True)
class Box:
    """The block `offset[i] <= index[i] < offset[i] + size[i]` of a global tensor."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @staticmethod
    def whole(shape: tuple[int, ...]) -> Box:
        """The box that covers a tensor of `shape`."""
        return Box((0,) * len(shape), tuple(shape))

    @property
    def num_elements(self) -> int:
        return prod(self.size)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of this box in the global tensor."""
        return tuple(slice(o, o + s) for o, s in zip(self.offset, self.size, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The overlap, in global coordinates, or None where there is none."""
        start = tuple(map(max, self.offset, other.offset))
        stop = tuple(min(a + n, b + m) for a, n, b, m in
                     zip(self.offset, self.size, other.offset, other.size, strict=True))
        if any(a >= b for a, b in zip(start, stop, strict=True)):
            return None
        return Box(start, tuple(b - a for a, b in zip(start, stop, strict=True)))

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Index of this box in a tensor that holds exactly `outer`."""
        return tuple(slice(o - p, o - p + s) for o, s, p in zip(self.offset, self.size, outer.offset, strict=True))

    def narrow(self, dim: int, start: int, length: int) -> Box:
        """The part `[start, start + length)` (relative to this box) along `dim`."""
        offset, size = list(self.offset), list(self.size)
        offset[dim] += start
        size[dim] = length
        return Box(tuple(offset), tuple(size))


def flat_range_boxes(box: Box, start: int, stop: int) -> list[tuple[Box, int]]:
    """Boxes of the flat range `[start, stop)` of a contiguous tensor that holds `box`.

    Returns:
        Pairs of a box in global coordinates and the flat position, relative to `start`, at which its elements lie
        contiguously in row-major order.  Together they cover the range exactly once, in order.
    """
    start, stop = max(start, 0), min(stop, box.num_elements)
    return _range_boxes(box, 0, start, stop, start)


def _range_boxes(box: Box, dim: int, start: int, stop: int, origin: int) -> list[tuple[Box, int]]:
    """`start`/`stop` are flat positions inside the sub-box in which every dimension before `dim` has size one."""
    if start >= stop:
        return []
    if dim == len(box.size):
        return [(box, start - origin)]
    stride = prod(box.size[dim + 1:])
    first, last = -(-start // stride), stop // stride        # whole rows are [first, last)
    if first > last:                                         # the range lies strictly inside one row
        row = start // stride
        return _inner(box, dim, row, start, stop, stride, origin)
    found: list[tuple[Box, int]] = []
    if start < first * stride:
        found += _inner(box, dim, first - 1, start, first * stride, stride, origin)
    if first < last:
        found.append((box.narrow(dim, first, last - first), first * stride - origin))
    if last * stride < stop:
        found += _inner(box, dim, last, last * stride, stop, stride, origin)
    return found


def _inner(box: Box, dim: int, row: int, start: int, stop: int, stride: int, origin: int) -> list[tuple[Box, int]]:
    base = row * stride
    return _range_boxes(box.narrow(dim, row, 1), dim + 1, start - base, stop - base, origin - base)


def strides_of(size: tuple[int, ...]) -> tuple[int, ...]:
    """How far apart neighbours lie along each dimension of a row-major tensor."""
    return tuple(prod(size[dim + 1:]) for dim in range(len(size)))


def flat_position(region: Box, outer: Box) -> int:
    """Position of the first element of `region` in the row-major tensor that holds `outer`."""
    return sum((r - o) * stride for r, o, stride in
               zip(region.offset, outer.offset, strides_of(outer.size), strict=True))


def contiguous_in(region: Box, outer: Box) -> bool:
    """Is `region` one stretch of the row-major tensor that holds `outer`?

    So it is if it takes single indices of the first dimensions, a range of the next, and all of the others.
    """
    widest = next((d for d, size in enumerate(region.size) if size > 1), len(region.size))
    return region.size[widest + 1:] == outer.size[widest + 1:]


def subtract(box: Box, hole: Box) -> list[Box]:
    """What remains of `box` without `hole`, which lies inside it: disjoint boxes, at most two per dimension."""
    parts: list[Box] = []
    for dim in range(len(box.size)):
        before = hole.offset[dim] - box.offset[dim]
        after = box.size[dim] - before - hole.size[dim]
        if before:
            parts.append(box.narrow(dim, 0, before))
        if after:
            parts.append(box.narrow(dim, before + hole.size[dim], after))
        box = box.narrow(dim, before, hole.size[dim])
    return parts


def inside(box: Box, shape: tuple[int, ...]) -> bool:
    """Does `box` lie within a tensor of `shape`?"""
    return (len(box.offset) == len(box.size) == len(shape)
            and all(0 <= o and 0 <= s and o + s <= n for o, s, n in zip(box.offset, box.size, shape, strict=True)))
