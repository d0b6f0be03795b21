"""A kernel beside its reference: same inputs, same upstream gradients, outputs and gradients compared.

An error is measured against the size of the tensor it is in.  Where the reference is zero, up to rounding, there is
nothing to measure against: a gradient in which everything cancels, such as that of a query with a single key (the
softmax over one number does not move).  There a kernel may be off by the rounding of what cancelled, and that has the
size of the other gradients.
"""

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


def size(x: Tensor) -> float:
    """Largest magnitude."""
    return x.double().abs().max().item()


def relative_error(got: Tensor, want: Tensor, cancelled: float = 0.0) -> float:
    """Largest difference, relative to the largest magnitude of `want`.

    Args:
        cancelled: the size of the terms that cancel where `want` is zero up to their rounding; 0: there are none.
    """
    difference, scale = size(got.double() - want.double()), size(want)
    if scale <= torch.finfo(want.dtype).eps * cancelled:
        scale = cancelled
    return difference / scale if scale else (float("inf") if difference else 0.0)


def forward_backward(function: Function, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs of `function` on `inputs` cast to `dtype`, then the inputs' gradients for fixed upstream gradients."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [random(*out.shape, seed=99 + i).to(torch.bfloat16).to(out) for i, out in enumerate(outputs)]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def assert_equal(fast: Function, reference: Function, inputs: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Outputs and gradients of `fast` in `dtype` are those of `reference`, and have the inputs' dtype and shape."""
    rounded = [x.to(dtype) for x in inputs]
    got = forward_backward(fast, rounded, dtype)
    want = forward_backward(reference, rounded, torch.float32 if dtype == torch.bfloat16 else dtype)
    for gradient, x in zip(got[-len(inputs):], rounded, strict=True):
        assert gradient.dtype == dtype and gradient.shape == x.shape
    largest_gradient = max(size(gradient) for gradient in want[-len(inputs):])
    for i, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        assert mine.shape == theirs.shape
        error = relative_error(mine, theirs, largest_gradient)
        assert error < TOLERANCE[dtype], f"tensor {i}: {error:.1e}"
