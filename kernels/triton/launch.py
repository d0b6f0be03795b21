"""How kernels written in Triton are launched, and described for compilation ahead of time.

A kernel is a function of pointers and numbers, compiled when it is first launched with arguments of new types.  All go
through `launch`: whoever wants to know what a step tells the device to do looks there (and the make-believe accelerator
of the tests, which has no values to compute with, stops there).

Conventions: tensors are contiguous and their last dimension is the feature dimension, unless strides are passed; every
load is widened to fp32 and every store rounds once; sums are in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Ahead:
    """A kernel with the types it is launched with in training, for compiling it without a device.

    Attributes:
        kernel: a function decorated with `triton.jit`.
        types: of its arguments that are no constants, in order, as Triton writes them: `*bf16`, `i32`.
        constants: by name.
        num_warps: of 32 threads, that share one program.
        max_registers: per thread, so that as many programs as planned fit on a multiprocessor.
        note: what the constants stand for.
        aligned: arguments, besides all pointers, that are multiples of 16 in training, as Triton sees at a launch.
    """

    kernel: Any
    types: Sequence[str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    max_registers: int = 64
    note: str = ""
    aligned: Sequence[str] = ()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Tensor | float, num_warps: int = 4,
           **constants: Any) -> None:
    """Runs `kernel` once for every point of `grid`."""
    kernel[grid](*arguments, num_warps=num_warps, **constants)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`: block sizes are no others."""
    return 1 << (n - 1).bit_length()


def warps_for(block: int) -> int:
    """So many that a thread has at most 16 elements of a block."""
    return min(max(block // 512, 1), 16)
