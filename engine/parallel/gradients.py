"""Where gradients go: straight into fp32 accumulators, without passing through `.grad`.

A `GradSlot` is a parameter's place in a flat gradient bucket (`engine.parallel.data`).  Layers that know their weight
gradient is a matrix product add it there with one fused multiply-accumulate; everything else (norms, biases) arrives
through autograd and a hook, in fp32 too: a parameter with a slot takes gradients in the slot's dtype, whatever its own.
So what an operation's backward pass has summed up over tokens is rounded nowhere on its way.  The bucket hears of every
contribution, and starts reducing behind the last one it needs, while the backward pass still runs.

`WeightGradQueue` is the other half of a zero-bubble pipeline: while it is open, layers leave their weight gradient in
it as a closure instead of computing it, and the schedule's `W` action runs them later.

A parameter without a slot behaves as in any torch model: its gradient is returned to autograd.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class GradSlot:
    """One parameter's accumulator."""

    def __init__(self, view: Tensor, before: Callable[[], None], after: Callable[[], None]) -> None:
        """`view` has the parameter's shape; the callbacks surround every contribution."""
        self._view, self._before, self._after = view, before, after
        self._fresh = True
        self.contributions = 0

    def begin_step(self) -> None:
        """A new sum begins, and the count with it."""
        self._fresh, self.contributions = True, 0

    def close(self) -> None:
        """What was summed up is about to be taken away: nothing, where nothing came, and not what memory held."""
        if self._fresh:
            self._view.zero_()

    def restart(self) -> None:
        """What was summed up has been taken away: the next contribution overwrites."""
        self._fresh = True

    @property
    def dtype(self) -> torch.dtype:
        """In which gradients are summed up."""
        return self._view.dtype

    def contribute(self, write: Callable[[Tensor, bool], None]) -> None:
        """Has a gradient written: `write(view, accumulate)` adds to the view, or overwrites it without `accumulate`."""
        self._before()
        write(self._view, not self._fresh)
        self._fresh = False
        self.contributions += 1
        self._after()

    def add(self, grad: Tensor) -> None:
        """Adds a gradient of the parameter's local shape."""
        def write(view: Tensor, accumulate: bool) -> None:
            view.add_(grad) if accumulate else view.copy_(grad)

        self.contribute(write)

    def add_rows(self, index: Tensor, rows: Tensor) -> None:
        """Adds `rows` [n, width] at the row numbers `index` [n]."""
        def write(view: Tensor, accumulate: bool) -> None:
            (view if accumulate else view.zero_()).index_add_(0, index, rows.to(view.dtype))

        self.contribute(write)


def attach_slot(parameter: nn.Parameter, slot: GradSlot) -> None:
    """Routes the parameter's gradient into `slot`, whichever way it arrives."""
    parameter.grad_slot = slot  # type: ignore[attr-defined]
    parameter.grad_dtype = slot.dtype

    def from_autograd(p: Tensor) -> None:
        if p.grad is not None:
            grad, p.grad = p.grad, None
            slot.add(grad)

    parameter.register_post_accumulate_grad_hook(from_autograd)


def slot_of(parameter: Tensor) -> GradSlot | None:
    """The parameter's slot, if it has one."""
    return getattr(parameter, "grad_slot", None)


class WeightGradQueue:
    """Weight gradients waiting for their `W` action, first in, first out."""

    def __init__(self) -> None:
        self._open = False
        self._waiting: list[Callable[[], None]] = []

    def submit(self, compute: Callable[[], None]) -> None:
        """Runs `compute` now, or keeps it for later while the queue is open."""
        if self._open:
            self._waiting.append(compute)
        else:
            compute()

    def open(self) -> None:
        """From here on, weight gradients wait."""
        self._open = True

    def close(self) -> list[Callable[[], None]]:
        """Stops waiting and hands over what was left since `open`."""
        waiting, self._waiting, self._open = self._waiting, [], False
        return waiting
