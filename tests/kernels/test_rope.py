"""Rotary embedding on the fused QKV tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels.rope import rotate_reference, split_and_rotate
from tests.kit.compare import DTYPES, assert_equal, random


def angles(length: int, batch: int, half: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    turns = random(length, batch, 1, 1, half, seed=7)
    return turns.cos().to(dtype), turns.sin().to(dtype)


def split_reference(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    turned = rotate_reference(qkv[..., :-1, :], cos, sin)
    return turned[..., :-1, :], turned[..., -1, :], qkv[..., -1, :]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("groups", "queries", "dim"), [(3, 1, 8), (2, 4, 6), (1, 3, 2)])
@pytest.mark.parametrize("batch_of_angles", [1, 2], ids=["same-positions", "own-positions"])
def test_equals_the_reference(groups: int, queries: int, dim: int, batch_of_angles: int, dtype: torch.dtype) -> None:
    qkv = random(5, 2, groups, queries + 2, dim, seed=8)
    cos, sin = (x.to(torch.bfloat16).to(torch.float64) for x in angles(5, batch_of_angles, dim // 2, torch.float64))
    assert_equal(lambda x: split_and_rotate(x, cos.to(x.dtype), sin.to(x.dtype)),
                 lambda x: split_reference(x, cos.to(x.dtype), sin.to(x.dtype)), [qkv], dtype)


def test_gradients_by_finite_differences() -> None:
    cos, sin = angles(3, 2, 2, torch.float64)
    qkv = random(3, 2, 2, 4, 4, seed=9).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: split_and_rotate(x, cos, sin), (qkv,))


def test_a_rotation_keeps_lengths_and_relative_angles() -> None:
    """What RoPE is for: ⟨R(p)q, R(s)k⟩ depends on p − s alone."""
    theta = torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)
    q, k = random(6, seed=10), random(6, seed=11)

    def turned(x: Tensor, position: int) -> Tensor:
        qkv = torch.stack((x, x, x)).view(1, 1, 1, 3, 6)
        turns = (position * theta).view(1, 1, 1, 1, 3)
        return split_and_rotate(qkv, turns.cos(), turns.sin())[0].flatten()

    assert torch.allclose(turned(q, 17).norm(), q.norm())
    assert torch.allclose(turned(q, 17) @ turned(k, 5), turned(q, 112) @ turned(k, 100))
    assert not torch.allclose(turned(q, 17) @ turned(k, 5), turned(q, 17) @ turned(k, 6))


def test_the_input_is_left_alone() -> None:
    qkv, (cos, sin) = random(4, 1, 1, 3, 4, seed=12), angles(4, 1, 2, torch.float64)
    before = qkv.clone()
    split_and_rotate(qkv, cos, sin)[2].zero_()
    assert torch.equal(qkv, before)
