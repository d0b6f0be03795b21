"""The three matrix products of one linear layer, as an object of its own.

    forward               y  = x·Wᵀ + b
    input gradient        dx = dy·W
    weight gradient       dW = dyᵀ·x, summed up where gradients are summed up (`engine.parallel.gradients`)

A layer's products belong together: in narrow formats each has a scaling of its own that is learned from step to step,
and what one casts another may use again.  So every cut layer has its own `Gemms`, made for it by the run's factory from
the weight's spec, which may keep state.  The products here keep none: they are those of the operations table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from engine.kernels.table import Operations
from engine.model.spec import ParamSpec


class Gemms(Protocol):
    """What a layer asks for; matrices are 2-D, activations [..., features].  None of it is seen by autograd."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[..., k], [n, k], [n] → [..., n]."""
        ...

    def input_gradient(self, grad_out: Tensor, weight: Tensor) -> Tensor:
        """[..., n], [n, k] → [..., k]."""
        ...

    def weight_gradient(self, out: Tensor, grad_out: Tensor, x: Tensor, *, accumulate: bool) -> None:
        """Adds to, or without `accumulate` overwrites, `out` [n, k], given [tokens, n] and [tokens, k].

        With a zero-bubble schedule it is called long after the other two, at the microbatch's `W`.
        """
        ...


# The products of the layer whose weight has this spec.
GemmsFactory = Callable[[ParamSpec], Gemms]


class PlainGemms:
    """The operations table's products, in the dtype of the operands."""

    def __init__(self, operations: Operations) -> None:
        self._linear, self._add_product = operations.linear, operations.weight_gradient

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._linear(x, weight, bias)

    def input_gradient(self, grad_out: Tensor, weight: Tensor) -> Tensor:
        return self._linear(grad_out, weight.T)

    def weight_gradient(self, out: Tensor, grad_out: Tensor, x: Tensor, *, accumulate: bool) -> None:
        self._add_product(out, grad_out.T, x, accumulate=accumulate)


def plain_gemms(operations: Operations) -> GemmsFactory:
    """The same products for every layer."""
    return lambda spec: PlainGemms(operations)
