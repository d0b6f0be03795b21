"""RMSNorm: value and gradients."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.rms_norm import rms_norm, rms_norm_reference
from tests.kit.compare import DTYPES, assert_equal, random


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 3, 48), (1, 1, 5), (4, 33)], ids=str)
@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_equals_the_reference(shape: tuple[int, ...], eps: float, dtype: torch.dtype) -> None:
    inputs = (random(*shape, seed=1) * 3, 1 + 0.5 * random(shape[-1], seed=2))
    assert_equal(lambda x, w: rms_norm(x, w, eps), lambda x, w: rms_norm_reference(x, w, eps), inputs, dtype)


def test_gradients_by_finite_differences() -> None:
    x, weight = random(3, 2, 6, seed=3).requires_grad_(), random(6, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (x, weight))


def test_rows_of_zeros_and_rows_of_every_size_are_finite() -> None:
    x = torch.tensor([0.0, 1e-20, 1e15])[:, None].expand(3, 8).clone().requires_grad_()
    out = rms_norm(x, torch.ones(8), 1e-6)
    out.sum().backward()
    assert out[0].eq(0).all() and torch.allclose(out[2], torch.ones(8)) and x.grad.isfinite().all()


def test_a_frozen_weight_gets_no_gradient() -> None:
    x, weight = random(4, 8, seed=5).requires_grad_(), torch.ones(8, dtype=torch.float64)
    rms_norm(x, weight, 1e-6).sum().backward()
    assert x.grad is not None and weight.grad is None
