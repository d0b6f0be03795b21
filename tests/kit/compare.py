"""A kernel beside its reference: same inputs, same upstream gradients, outputs and gradients compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels.operation import Operation, Place, Unavailable

Function = Callable[..., Tensor | tuple[Tensor, ...]]

# Largest difference, relative to the largest magnitude of the tensor.  In bf16 the reference is computed in fp32 on the
# same rounded inputs; a kernel may round a few times on its way.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2}
DTYPES = tuple(TOLERANCE)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, the same for every dtype up to rounding."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def found(operation: Operation, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The implementation of this name; the test is skipped where it is not available."""
    entry = next(entry for entry in operation.implementations if entry.name == name)
    try:
        return entry.find(Place(device, dtype))
    except Unavailable as reason:
        pytest.skip(f"{operation.name}: {name} is not available ({reason})")


def relative_error(got: Tensor, want: Tensor, least: float = 0.0) -> float:
    """Largest difference, relative to the largest magnitude of `want`, or to `least` where that is larger."""
    scale = max(want.double().abs().max().item(), least)
    return (got.double() - want.double()).abs().max().item() / (scale or 1.0)


def forward_backward(function: Function, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs of `function` on `inputs` cast to `dtype`, then the inputs' gradients for fixed upstream gradients."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [random(*out.shape, seed=99 + i).to(torch.bfloat16).to(out) for i, out in enumerate(outputs)]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def assert_equal(fast: Function, reference: Function, inputs: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Outputs and gradients of `fast` in `dtype` are those of `reference`, and have the inputs' dtype and shape.

    A tensor that is far smaller than the others is a difference of such as these (the gradient of a softmax over one
    number is none at all), and cannot be more exact than they are.
    """
    rounded = [x.to(dtype) for x in inputs]
    got = forward_backward(fast, rounded, dtype)
    want = forward_backward(reference, rounded, torch.float32 if dtype == torch.bfloat16 else dtype)
    for gradient, x in zip(got[-len(inputs):], rounded, strict=True):
        assert gradient.dtype == dtype and gradient.shape == x.shape
    least = 1e-2 * max(theirs.abs().max().item() for theirs in want)
    for i, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        assert mine.shape == theirs.shape
        error = relative_error(mine, theirs, least)
        assert error < TOLERANCE[dtype], f"tensor {i}: {error:.1e}"
