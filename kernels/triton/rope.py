"""Split of the fused projection and rotary embedding, one pass each way.

A program takes one token of one key-value group: its Q + 2 heads lie one behind the other in the fused projection, and
go to three tensors, or come from three gradients.  Backward turns by the opposite angle.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.operation import Place
from engine.kernels.triton.launch import Ahead, launch, power_of_two


@triton.jit
def kernel(qkv: tl.tensor, query: tl.tensor, key: tl.tensor, value: tl.tensor, cos: tl.tensor, sin: tl.tensor,
           batch: tl.tensor, groups: tl.tensor, angles_s: tl.tensor, angles_b: tl.tensor, q_s: tl.tensor,
           q_b: tl.tensor, q_g: tl.tensor, q_q: tl.tensor, k_s: tl.tensor, k_b: tl.tensor, k_g: tl.tensor,
           v_s: tl.tensor, v_b: tl.tensor, v_g: tl.tensor, QUERIES: tl.constexpr, HALF: tl.constexpr,
           QUERY_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, BACKWARD: tl.constexpr) -> None:
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    s = token // batch
    b = token % batch
    j = tl.arange(0, HALF_BLOCK)
    head = tl.arange(0, QUERY_BLOCK)
    there = j < HALF
    c = tl.load(cos + s * angles_s + b * angles_b + j, mask=there, other=0.0).to(tl.float32)
    t = tl.load(sin + s * angles_s + b * angles_b + j, mask=there, other=0.0).to(tl.float32)
    fused = qkv + (token * groups + group) * (QUERIES + 2) * 2 * HALF
    here = (head[:, None] < QUERIES) & there[None, :]
    split = query + s * q_s + b * q_b + group * q_g + head[:, None] * q_q + j[None, :]
    both = fused + head[:, None] * 2 * HALF + j[None, :]
    k_split = key + s * k_s + b * k_b + group * k_g + j
    k_fused = fused + QUERIES * 2 * HALF + j
    v_split = value + s * v_s + b * v_b + group * v_g + j
    v_fused = fused + (QUERIES + 1) * 2 * HALF + j
    if BACKWARD:
        first = tl.load(split, mask=here, other=0.0).to(tl.float32)
        second = tl.load(split + HALF, mask=here, other=0.0).to(tl.float32)
        tl.store(both, first * c[None, :] + second * t[None, :], mask=here)
        tl.store(both + HALF, second * c[None, :] - first * t[None, :], mask=here)
        first_k = tl.load(k_split, mask=there, other=0.0).to(tl.float32)
        second_k = tl.load(k_split + HALF, mask=there, other=0.0).to(tl.float32)
        tl.store(k_fused, first_k * c + second_k * t, mask=there)
        tl.store(k_fused + HALF, second_k * c - first_k * t, mask=there)
        tl.store(v_fused, tl.load(v_split, mask=there, other=0.0), mask=there)
        tl.store(v_fused + HALF, tl.load(v_split + HALF, mask=there, other=0.0), mask=there)
    else:
        first = tl.load(both, mask=here, other=0.0).to(tl.float32)
        second = tl.load(both + HALF, mask=here, other=0.0).to(tl.float32)
        tl.store(split, first * c[None, :] - second * t[None, :], mask=here)
        tl.store(split + HALF, second * c[None, :] + first * t[None, :], mask=here)
        first_k = tl.load(k_fused, mask=there, other=0.0).to(tl.float32)
        second_k = tl.load(k_fused + HALF, mask=there, other=0.0).to(tl.float32)
        tl.store(k_split, first_k * c - second_k * t, mask=there)
        tl.store(k_split + HALF, second_k * c + first_k * t, mask=there)
        tl.store(v_split, tl.load(v_fused, mask=there, other=0.0), mask=there)
        tl.store(v_split + HALF, tl.load(v_fused + HALF, mask=there, other=0.0), mask=there)


def _turn(qkv: Tensor, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, *, backward: bool) -> None:
    """From `qkv` to the others, or back; [S, B, G, Q + 2, D], [S, B, G, Q, D], [S, B, G, D] twice, strides free."""
    length, batch, groups, heads, dim = qkv.shape
    along_batch = cos.stride(1) if cos.shape[1] > 1 else 0
    launch(kernel, (length * batch, groups), qkv, query, key, value, cos, sin, batch, groups, cos.stride(0),
           along_batch, *query.stride()[:4], *key.stride()[:3], *value.stride()[:3], QUERIES=heads - 2,
           HALF=dim // 2, QUERY_BLOCK=power_of_two(heads - 2), HALF_BLOCK=power_of_two(dim // 2), BACKWARD=backward,
           num_warps=1)


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
        lead, queries, dim = qkv.shape[:3], qkv.shape[3] - 2, qkv.shape[4]
        query, key, value = (qkv.new_empty((*lead, *shape)) for shape in ((queries, dim), (dim,), (dim,)))
        _turn(qkv, query, key, value, cos, sin, backward=False)
        ctx.save_for_backward(cos, sin)
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = (grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads)
        grad = query.new_empty((*query.shape[:3], query.shape[3] + 2, query.shape[4]))
        _turn(grad, query, key, value, *ctx.saved_tensors, backward=True)
        return grad, None, None


def split_and_rotate(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `engine.kernels.rope.split_and_rotate`."""
    return _SplitAndRotate.apply(qkv, cos, sin)


def try_out(place: Place) -> None:
    """Compiles and runs all of it on something small."""
    qkv = torch.zeros(2, 1, 1, 3, 8, dtype=place.dtype, device=place.device, requires_grad=True)
    angles = torch.zeros(2, 1, 1, 1, 4, dtype=place.dtype, device=place.device)
    query, key, value = split_and_rotate(qkv, angles, angles)
    (query.sum() + key.sum() + value.sum()).backward()


def ahead() -> Iterator[Ahead]:
    """Four query heads for one of keys: of 64 (Llama 3.2 1B) and of 128."""
    for dim in (64, 128):
        for backward in (False, True):
            yield Ahead(kernel, (*["*bf16"] * 6, *["i32"] * 14),
                        {"QUERIES": 4, "HALF": dim // 2, "QUERY_BLOCK": 4, "HALF_BLOCK": dim // 2,
                         "BACKWARD": backward}, 1, 96, f"{'backward' if backward else 'forward'}, {dim}",
                        tuple(name for name in kernel.arg_names if name[-2:] in ("_s", "_b", "_g", "_q")))
