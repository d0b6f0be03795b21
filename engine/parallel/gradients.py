"""Where gradients go: straight into fp32 accumulators, without passing through `.grad`.

A `GradSlot` is a parameter's place in a flat gradient bucket (`engine.parallel.data`).  Layers that know their weight
gradient is a matrix product add it there with one fused multiply-accumulate; everything else (norms, biases) arrives
through autograd and a hook.  A slot counts the contributions of a step (microbatches × uses), and the last one tells
the bucket, which starts reducing while the backward pass still runs.

`WeightGradQueue` is the other half of a zero-bubble pipeline: while it is open, layers leave their weight gradient in
it as a closure instead of computing it, and the schedule's `W` action runs them later.

A parameter without a slot behaves as in any torch model: its gradient is returned to autograd.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class GradSlot:
    """One parameter's accumulator."""

    def __init__(self, accumulator: Callable[[], Tensor], on_complete: Callable[[], None]) -> None:
        """`accumulator` returns the (possibly just allocated) view; `on_complete` is told of the last contribution."""
        self._accumulator = accumulator
        self._on_complete = on_complete
        self._remaining = 0
        self._fresh = True

    def expect(self, contributions: int, *, fresh: bool = True) -> None:
        """Begins a sum of `contributions` terms; `fresh` overwrites whatever the accumulator held."""
        self._remaining, self._fresh = contributions, fresh

    @property
    def missing(self) -> int:
        """Contributions still to come."""
        return self._remaining

    def add(self, grad: Tensor) -> None:
        """Adds a gradient of the parameter's local shape."""
        view = self._accumulator()
        view.copy_(grad) if self._fresh else view.add_(grad)
        self._contributed()

    def add_matmul(self, a: Tensor, b: Tensor) -> None:
        """Adds the matrix product a·b, the parameter viewed as a matrix: no temporary where the dtypes agree."""
        view = self._accumulator()
        matrix = view.view(a.shape[0], b.shape[1])
        if view.dtype != a.dtype:
            product = a @ b
            matrix.copy_(product) if self._fresh else matrix.add_(product)
        elif self._fresh:
            matrix.addmm_(a, b, beta=0)
        else:
            matrix.addmm_(a, b)
        self._contributed()

    def add_rows(self, index: Tensor, rows: Tensor) -> None:
        """Adds `rows` [n, width] at the row numbers `index` [n]."""
        view = self._accumulator()
        if self._fresh:
            view.zero_()
        view.index_add_(0, index, rows.to(view.dtype))
        self._contributed()

    def _contributed(self) -> None:
        if self._remaining == 0:
            raise RuntimeError("a parameter received more gradients than the schedule has microbatches")
        self._fresh = False
        self._remaining -= 1
        if self._remaining == 0:
            self._on_complete()


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
