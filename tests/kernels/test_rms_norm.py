"""RMSNorm: value and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, made_of, with_operators
from tests.kit.compare import DTYPES, assert_equal, random


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return add_rms_norm(x, None, weight, eps)[1]


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return add_rms_norm_reference(x, None, weight, eps)[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 3, 48), (1, 1, 5), (4, 33)], ids=str)
@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_equals_the_reference(shape: tuple[int, ...], eps: float, dtype: torch.dtype) -> None:
    inputs = (random(*shape, seed=1) * 3, 1 + 0.5 * random(shape[-1], seed=2))
    assert_equal(lambda x, w: rms_norm(x, w, eps), lambda x, w: rms_norm_reference(x, w, eps), inputs, dtype)


def test_gradients_by_finite_differences() -> None:
    x, weight = random(3, 2, 6, seed=3).requires_grad_(), random(6, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (x, weight))


def test_the_residual_stream_goes_on_and_its_gradient_joins() -> None:
    x, residual, weight = (random(*shape, seed=len(shape)).requires_grad_() for shape in ((3, 6), (3, 6), (6,)))
    assert torch.autograd.gradcheck(lambda x, r, w: add_rms_norm(x, r, w, 1e-3), (x, residual, weight))
    assert torch.autograd.gradcheck(lambda x, w: add_rms_norm(x, None, w, 1e-3), (x, weight))
    total, _ = add_rms_norm(x, residual, weight, 1e-3)           # the norm itself is not used
    assert all(grad is not None and grad.eq(1).all() for grad in torch.autograd.grad(total.sum(), (x, residual)))


def test_rows_of_zeros_and_rows_of_every_size_are_finite() -> None:
    x = torch.tensor([0.0, 1e-20, 1e15])[:, None].expand(3, 8).clone().requires_grad_()
    out = rms_norm(x, torch.ones(8), 1e-6)
    out.sum().backward()
    assert out[0].eq(0).all() and torch.allclose(out[2], torch.ones(8)) and x.grad.isfinite().all()


def test_a_frozen_weight_gets_no_gradient() -> None:
    x, weight = random(4, 8, seed=5).requires_grad_(), torch.ones(8, dtype=torch.float64)
    rms_norm(x, weight, 1e-6).sum().backward()
    assert x.grad is not None and weight.grad is None


def backward_operator(grad: Tensor, x: Tensor, shape: list[int], rstd: Tensor, weight: Tensor,
                      mask: list[bool]) -> tuple[Tensor, None]:
    """Stands for the one that torch has for GPUs only; like that one it computes in fp32 and wants dense operands."""
    assert grad.is_contiguous() and x.is_contiguous() and shape == [x.shape[-1]] and mask == [True, False]
    wide = torch.promote_types(x.dtype, torch.float32)
    x_hat, scaled = x.to(wide) * rstd, grad.to(wide) * weight.to(wide)
    return ((scaled - x_hat * (scaled * x_hat).mean(-1, keepdim=True)) * rstd).to(x.dtype), None


def normalise(x: Tensor, weight: Tensor) -> Tensor:
    return made_of(with_operators(torch.ops.aten._fused_rms_norm, backward_operator))(x, None, weight, 1e-5)[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_made_of_torchs_operators(dtype: torch.dtype) -> None:
    inputs = (random(7, 3, 48, seed=1) * 3, 1 + 0.5 * random(48, seed=2))
    assert_equal(normalise, lambda x, w: rms_norm_reference(x, w, 1e-5), inputs, dtype)
    rows_last = (random(48, 3, 7, seed=1) * 3, inputs[1])
    assert_equal(lambda x, w: normalise(x.transpose(0, 2), w),
                 lambda x, w: rms_norm_reference(x.transpose(0, 2), w, 1e-5), rows_last, dtype)


def test_made_of_torchs_operators_the_weights_gradient_is_an_fp32_sum() -> None:
    x, grad = random(4096, 32, seed=6, dtype=torch.bfloat16), random(4096, 32, seed=7, dtype=torch.bfloat16)
    weight = torch.nn.Parameter(torch.ones(32, dtype=torch.bfloat16))
    weight.grad_dtype = torch.float32
    normalise(x, weight).backward(grad)
    wide = x.double()
    want = (grad.double() * wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).sum(0)
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert (weight.grad - want).norm() < 1e-5 * want.norm()      # a running sum of 4096; in bf16 it would be 2e-3


def test_a_frozen_weight_costs_nothing() -> None:
    x = random(4, 8, seed=5).requires_grad_()
    normalise(x, torch.ones(8, dtype=torch.float64)).sum().backward()
    assert x.grad is not None
