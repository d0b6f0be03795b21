"""Stochastic rounding to bf16: up or down by chance, so that on average nothing is lost.

A weight in bf16 has eight bits; an update of less than half its last bit, rounded to nearest, is an update of nothing.
Rounded up with a probability that is the part of the way it has gone (Gupta et al. 2015), many such updates add up to
what they should.  Of an fp32 number that means: add 16 random bits to the 16 that bf16 has not, and cut these off.

The bits come from a counter: a hash of (seed and parameter, update, element of the global tensor), so they are the same
in every layout and after every restart, and there is no generator whose state would have to be kept.  The hash is a
bijection of 32 bits, two multiplications with xor-shifts around them (Wellons 2018, `lowbias32`); beyond 2³² elements
of a tensor counters repeat, far from each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

M1, M2 = 0x7FEB352D, 0x846CA68B                # of the hash
GOLDEN = 0x9E3779B9                            # 2³² / golden ratio: updates are far apart
CHUNK = 1 << 22                                # elements rounded at once: each takes some 30 bytes meanwhile


@dataclass(frozen=True)
class Counted:
    """A range of a vector that is a box of a global tensor, whose elements' numbers are worked out from their place.

    Element i of the range has the number `origin + i // run · stride + i % run`.

    Attributes:
        start, size: the range.
        key: 32 bits, of seed and parameter; signed, as all numbers of 32 bits here.
    """

    start: int
    size: int
    key: int
    run: int
    stride: int
    origin: int


def signed(number: int) -> int:
    """The last 32 bits, as an int32 has them."""
    return (number + 2**31) % 2**32 - 2**31


def counted(shape: Sequence[int], offset: Sequence[int], size: Sequence[int], start: int, key: int) -> Counted:
    """The box (offset, size) of a tensor of this shape, which lies row by row from `start` on.

    At most one dimension may be divided among those in which the box is longer than one.

    Raises:
        ValueError: it has 2³¹ elements or more, which kernels do not count.
    """
    origin, step, run, stride, whole = 0, 1, 1, 1, True
    for dim in reversed(range(len(shape))):
        origin += offset[dim] * step
        if whole:
            run *= size[dim]
            stride = step * shape[dim]
            whole = size[dim] == shape[dim]
        step *= shape[dim]
    total = 1
    for length in size:
        total *= length
    if total >= 2**31:
        raise ValueError(f"precision.masters: off: a rank has {total:,} elements of one parameter: divide it more "
                         "(parallel.tensor, parallel.zero), so that it has less than 2^31")
    return Counted(start, total, key, run, stride, origin)


def _mixed(x: Tensor) -> Tensor:
    """The hash of int32 numbers, in place."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(signed(M1))
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(signed(M2))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def noise(of: Counted, first: int, last: int, update: Tensor) -> Tensor:
    """16 random bits each for elements `first` to `last` of the range: int32.

    `update`: its number, a scalar on the device.
    """
    i = torch.arange(first, last, device=update.device)
    number = (i // of.run * of.stride + i % of.run + of.origin).to(torch.int32)
    key = _mixed((update.to(torch.int32) * signed(GOLDEN)).bitwise_xor_(of.key))
    return (_mixed(number.bitwise_xor_(key)) >> 16).bitwise_and_(0xFFFF)


def rounded(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 → bf16 by these bits; what is no finite number stays what it is."""
    up = x.view(torch.int32).add(bits).bitwise_and_(-0x10000).view(torch.float32)
    return torch.where(x.isfinite(), up, x).to(torch.bfloat16)


def round_into(out: Tensor, x: Tensor, ranges: Sequence[Counted], update: Tensor) -> None:
    """Writes the ranges of an fp32 vector to a bf16 one; what is between them stays."""
    for each in ranges:
        for first in range(0, each.size, CHUNK):
            last = min(first + CHUNK, each.size)
            there = slice(each.start + first, each.start + last)
            out[there] = rounded(x[there], noise(each, first, last, update))
