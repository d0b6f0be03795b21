"""Where gradients go: straight into fp32 accumulators, without passing through `.grad`.

A `GradSlot` is a parameter's place in a flat gradient bucket (`engine.parallel.data`).  Layers that know their weight
gradient is a matrix product add it there with one fused multiply-accumulate; everything else (norms, biases) arrives
through autograd and a hook.  The bucket hears of every contribution, and starts reducing behind the last one it needs,
while the backward pass still runs.

`WeightGradQueue` is the other half of a zero-bubble pipeline: while it is open, layers leave their weight gradient in
it as a closure instead of computing it, and the schedule's `W` action runs them later.

A parameter without a slot behaves as in any torch model: its gradient is returned to autograd.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from engine.kernels.matmul import matmul_into


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

    def add(self, grad: Tensor) -> None:
        """Adds a gradient of the parameter's local shape."""
        self._before()
        self._view.copy_(grad) if self._fresh else self._view.add_(grad)
        self._contributed()

    def add_matmul(self, a: Tensor, b: Tensor) -> None:
        """Adds the matrix product a·b, the parameter viewed as a matrix."""
        self._before()
        matmul_into(self._view.view(a.shape[0], b.shape[1]), a, b, accumulate=not self._fresh)
        self._contributed()

    def add_rows(self, index: Tensor, rows: Tensor) -> None:
        """Adds `rows` [n, width] at the row numbers `index` [n]."""
        self._before()
        if self._fresh:
            self._view.zero_()
        self._view.index_add_(0, index, rows.to(self._view.dtype))
        self._contributed()

    def _contributed(self) -> None:
        self._fresh = False
        self.contributions += 1
        self._after()


def attach_slot(parameter: nn.Parameter, slot: GradSlot) -> None:
    """Routes the parameter's gradient into `slot`, whichever way it arrives."""
    parameter.grad_slot = slot  # type: ignore[attr-defined]

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
