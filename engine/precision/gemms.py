"""The three matrix products of one linear layer, as an object of its own.

    forward               y  = x·Wᵀ + b
    input gradient        dx = dy·W
    weight gradient       dW = dyᵀ·x, summed up where gradients are summed up (`engine.parallel.gradients`)

A layer's products belong together: in narrow formats what one casts another uses again.  So every cut layer has its own
`Gemms`, made for it by the run's factory from the weight's spec, which may keep something.  A layer asks first for the
*operand* that stands for an activation or a gradient in its products; it is the operand that travels where tensor
ranks gather the sequence.  The products here are those of the operations table, their operands the tensors themselves;
those of `engine.precision.fp8` are narrower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from torch import Tensor

from engine.kernels.fp8 import Scaled
from engine.kernels.table import Operations
from engine.model.spec import ParamSpec

Operand: TypeAlias = Tensor | Scaled


class Gemms(Protocol):
    """What a layer asks for; weights are 2-D, activations [..., features].  None of it is seen by autograd."""

    def operand(self, x: Tensor, *, gradient: bool = False, scales: Tensor | None = None) -> Operand:
        """What stands for this rank's x, or for the gradient of its output, in the products.

        `scales`: those of an operand that was made of this x before; it is for the weight gradient now.
        """
        ...

    def forward(self, x: Operand, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[..., k], [n, k], [n] → [..., n]."""
        ...

    def input_gradient(self, grad_out: Operand, weight: Tensor) -> Tensor:
        """[..., n], [n, k] → [..., k]."""
        ...

    def weight_gradient(self, out: Tensor, grad_out: Operand, x: Operand, *, accumulate: bool) -> None:
        """Adds to, or without `accumulate` overwrites, `out` [n, k], given [..., n] and [..., k].

        With a zero-bubble schedule it is called long after the other two, at the microbatch's `W`.
        """
        ...


# The products of the layer whose weight has this spec.
GemmsFactory = Callable[[ParamSpec], Gemms]


class PlainGemms:
    """The operations table's products, in the dtype of the operands."""

    def __init__(self, operations: Operations) -> None:
        self._linear, self._add_product = operations.linear, operations.weight_gradient

    def operand(self, x: Tensor, *, gradient: bool = False, scales: Tensor | None = None) -> Operand:
        return x

    def forward(self, x: Operand, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._linear(x, weight, bias)

    def input_gradient(self, grad_out: Operand, weight: Tensor) -> Tensor:
        return self._linear(grad_out, weight.T)

    def weight_gradient(self, out: Tensor, grad_out: Operand, x: Operand, *, accumulate: bool) -> None:
        assert isinstance(grad_out, Tensor) and isinstance(x, Tensor)
        self._add_product(out, grad_out.flatten(0, -2).T, x.flatten(0, -2), accumulate=accumulate)


def plain_gemms(operations: Operations) -> GemmsFactory:
    """The same products for every layer."""
    return lambda spec: PlainGemms(operations)
