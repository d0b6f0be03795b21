"""The yardstick of the kernel tests: own scale, and for what cancels the scale of what cancelled."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.kit.compare import DTYPES, assert_equal, random, relative_error


class Residue(torch.autograd.Function):
    """x₂ as a function of (x₁, x₂): the first gradient is zero, up to a residue."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, first: Tensor, second: Tensor, residue: float) -> Tensor:
        ctx.residue = residue                                                   # type: ignore[attr-defined]
        return second.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return torch.full_like(grad, ctx.residue), grad, None                   # type: ignore[attr-defined]


def compare(residue: float, dtype: torch.dtype) -> None:
    inputs = [random(8, 8, seed=1), random(8, 8, seed=2)]
    assert_equal(lambda a, b: Residue.apply(a, b, residue), lambda a, b: 0 * a + b, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_of_what_cancels_is_no_error(dtype: torch.dtype) -> None:
    compare(torch.finfo(torch.float32 if dtype == torch.bfloat16 else dtype).eps, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_than_rounding_is_one(dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError, match="tensor 1"):
        compare(0.1, dtype)


def test_own_scale() -> None:
    want = torch.tensor([1e-6, -2e-6])
    assert relative_error(want * 1.5, want, cancelled=1.0) == pytest.approx(0.5)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(want, torch.zeros(2)) == math.inf
