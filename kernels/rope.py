"""Rotary position embedding (Su et al. 2021), on the fused QKV tensor.

With the half-rotation layout of Llama checkpoints, dimension j pairs with j + D/2 and position p turns the pair by the
angle p·θ_j, θ_j = base^(−2j/D):

    out₁ = x₁·cos − x₂·sin          out₂ = x₂·cos + x₁·sin

A rotation's transpose is the rotation by the opposite angle, so the backward pass is the same code with −sin.  Queries
and keys are turned in one pass over the fused tensor, and its gradient is assembled in one buffer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.kernels.operation import Implementation, Operation, anywhere, applied, in_triton


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Plain torch: turns the last dimension of `x` [..., D] by angles given as cos, sin [..., D/2] (broadcast)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def split_and_rotate_reference(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Plain torch; arguments as of `split_and_rotate`."""
    rotated = rotate_reference(qkv[..., :-1, :], cos, sin)
    return rotated[..., :-1, :], rotated[..., -1, :], qkv[..., -1, :]


def _rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        queries = qkv.shape[-2] - 2
        query_key = torch.empty_like(qkv[..., : queries + 1, :], memory_format=torch.contiguous_format)
        _rotate_into(query_key, qkv[..., : queries + 1, :], cos, sin)
        return query_key[..., :queries, :], query_key[..., queries, :], qkv[..., queries + 1, :].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_query, grad_key, grad_value = grads
        cos, sin = ctx.saved_tensors
        queries = grad_query.shape[-2]
        grad = grad_query.new_empty((*grad_query.shape[:-2], queries + 2, grad_query.shape[-1]))
        _rotate_into(grad[..., :queries, :], grad_query, cos, -sin)
        _rotate_into(grad[..., queries : queries + 1, :], grad_key.unsqueeze(-2), cos, -sin)
        grad[..., queries + 1, :] = grad_value
        return grad, None, None


def split_and_rotate(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Splits a fused projection and turns its queries and keys.

    Args:
        qkv: [S, B, G, Q + 2, D], per key-value group its Q query heads, then key, then value.
        cos, sin: [S, B or 1, 1, 1, D/2], in the dtype of `qkv`.

    Returns:
        queries [S, B, G, Q, D], keys [S, B, G, D], values [S, B, G, D].
    """
    return applied(_SplitAndRotate, qkv, cos, sin)


ROPE = Operation("rope", "split of the fused projection, rotary embedding", (
    Implementation("triton", in_triton("rope", "split_and_rotate")),
    Implementation("octant", anywhere(split_and_rotate)),
    Implementation("reference", anywhere(split_and_rotate_reference))))
