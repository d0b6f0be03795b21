"""SwiGLU on the fused gate and up projection."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.swiglu import swiglu, swiglu_reference
from tests.kit.compare import DTYPES, assert_equal, random


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6, 3, 2, 20), (1, 1, 2, 1), (5, 2, 7)], ids=str)
def test_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_equal(swiglu, swiglu_reference, [random(*shape, seed=1) * 4], dtype)


def test_gradients_by_finite_differences() -> None:
    assert torch.autograd.gradcheck(swiglu, (random(3, 2, 2, 5, seed=2).requires_grad_(),))


def test_the_input_and_the_incoming_gradient_are_left_alone() -> None:
    gate_up, upstream = random(3, 2, 4, seed=3), random(3, 4, seed=4)
    leaf, before = gate_up.clone().requires_grad_(), upstream.clone()
    swiglu(leaf).backward(upstream)
    assert torch.equal(leaf.detach(), gate_up) and torch.equal(upstream, before)


def test_large_gates_saturate() -> None:
    gate_up = torch.tensor([[1e4, -1e4], [2.0, 2.0]], requires_grad=True)
    out = swiglu(gate_up)
    out.sum().backward()
    assert torch.equal(out.detach(), torch.tensor([2e4, 0.0])) and gate_up.grad.isfinite().all()
