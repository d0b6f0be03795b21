"""RMSNorm in one pass each way, and the residual addition in front of it in the same pass.

Forward a program takes one row: adds, keeps the sum (which goes on along the residual stream), normalises.  Backward a
program takes several rows, so that it can sum up the weight's gradient in registers; what the programs have is summed
up by a second, small kernel.  The gradient that comes down the residual stream is added where the norm's is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.operation import Place
from engine.kernels.triton.launch import Ahead, launch, power_of_two, warps_for

# Programs of the backward pass: four for each multiprocessor of the largest GPUs.
PROGRAMS = 576


@triton.jit
def forward_kernel(x: tl.tensor, residual: tl.tensor, weight: tl.tensor, total: tl.tensor, out: tl.tensor,
                   rstd: tl.tensor, eps: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < SIZE
    value = tl.load(x + row * SIZE + column, mask=there, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * SIZE + column, mask=there, other=0.0).to(tl.float32)
        value = value.to(total.dtype.element_ty).to(tl.float32)             # what the residual stream will hold
        tl.store(total + row * SIZE + column, value, mask=there)
    scale = 1 / tl.sqrt(tl.sum(value * value, 0) / SIZE + eps)
    gain = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    tl.store(rstd + row, scale)
    tl.store(out + row * SIZE + column, (value * scale).to(out.dtype.element_ty).to(tl.float32) * gain, mask=there)


@triton.jit
def backward_kernel(grad: tl.tensor, x: tl.tensor, weight: tl.tensor, rstd: tl.tensor, grad_total: tl.tensor,
                    grad_x: tl.tensor, grad_weight: tl.tensor, rows: tl.tensor, rows_each: tl.tensor,
                    SIZE: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr) -> None:
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    there = column < SIZE
    gain = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    summed = tl.zeros((BLOCK,), tl.float32)
    row = program.to(tl.int64) * rows_each
    stop = row + rows_each
    while row < stop:
        use = there & (column * 0 + row < rows)
        upstream = tl.load(grad + row * SIZE + column, mask=use, other=0.0).to(tl.float32)
        scale = tl.load(rstd + tl.minimum(row, rows - 1))
        normal = tl.load(x + row * SIZE + column, mask=use, other=0.0).to(tl.float32) * scale
        summed += upstream * normal
        upstream *= gain
        value = (upstream - normal * (tl.sum(upstream * normal, 0) / SIZE)) * scale
        if ADD:
            value += tl.load(grad_total + row * SIZE + column, mask=use, other=0.0).to(tl.float32)
        tl.store(grad_x + row * SIZE + column, value, mask=use)
        row += 1
    tl.store(grad_weight + program * SIZE + column, summed, mask=there)


class _AddRMSNorm(torch.autograd.Function):
    """x, residual or None, weight → their sum, and its norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        size = x.shape[-1]
        rows, block = x.numel() // size, power_of_two(size)
        total = x if residual is None else torch.empty_like(x)
        out, rstd = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
        launch(forward_kernel, (rows,), x, x if residual is None else residual.contiguous(), weight, total, out, rstd,
               eps, SIZE=size, BLOCK=block, ADD=residual is not None, num_warps=warps_for(block))
        ctx.save_for_backward(total, weight, rstd)
        ctx.added = residual is not None
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        grad_total, grad = grads
        if grad is None:
            return grad_total, grad_total if ctx.added else None, None, None
        size, rows = total.shape[-1], rstd.numel()
        block, each = power_of_two(size), -(-rows // PROGRAMS)
        programs = -(-rows // each)
        grad, grad_x = grad.contiguous(), torch.empty_like(total)
        parts = torch.empty((programs, size), dtype=torch.float32, device=total.device)
        launch(backward_kernel, (programs,), grad, total, weight, rstd,
               grad if grad_total is None else grad_total.contiguous(), grad_x, parts, rows, each, SIZE=size,
               BLOCK=block, ADD=grad_total is not None, num_warps=warps_for(block))
        return grad_x, grad_x if ctx.added else None, parts.sum(0) if ctx.needs_input_grad[2] else None, None


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `engine.kernels.rms_norm.add_rms_norm`."""
    return _AddRMSNorm.apply(x, residual, weight, eps)


def try_out(place: Place) -> None:
    """Compiles and runs all of it on something small."""
    x = torch.zeros(2, 8, dtype=place.dtype, device=place.device, requires_grad=True)
    total, out = add_rms_norm(x, x, torch.ones_like(x[0]), 1.0)
    (total + out).sum().backward()


def ahead() -> Iterator[Ahead]:
    """Hidden sizes of models of 1B and 65B parameters."""
    for size, most in ((2048, 96), (8192, 128)):
        constants, warps = {"SIZE": size, "BLOCK": size, "ADD": True}, warps_for(size)
        yield Ahead(forward_kernel, (*["*bf16"] * 5, "*fp32", "fp32"), constants, warps, 64, f"add, {size}")
        yield Ahead(backward_kernel, (*["*bf16"] * 3, "*fp32", *["*bf16"] * 2, "*fp32", "i32", "i32"), constants, warps,
                    most, f"add, {size}")
