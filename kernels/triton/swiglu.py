"""SwiGLU, one pass each way.  Only the fused projection is kept: the sigmoid is computed again backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.operation import Place
from engine.kernels.triton.launch import Ahead, launch

BLOCK = 1024


@triton.jit
def forward_kernel(gate_up: tl.tensor, out: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < size
    gate = tl.load(gate_up + row * 2 * size + column, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, gate / (1 + tl.exp(-gate)) * up, mask=there)


@triton.jit
def backward_kernel(gate_up: tl.tensor, grad: tl.tensor, grad_gate_up: tl.tensor, size: tl.tensor,
                    BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < size
    gate = tl.load(gate_up + row * 2 * size + column, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + column, mask=there, other=0.0).to(tl.float32)
    upstream = tl.load(grad + row * size + column, mask=there, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-gate))
    tl.store(grad_gate_up + row * 2 * size + column, upstream * up * sigmoid * (1 + gate * (1 - sigmoid)), mask=there)
    tl.store(grad_gate_up + row * 2 * size + size + column, upstream * gate * sigmoid, mask=there)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        size = gate_up.shape[-1]
        out = gate_up.new_empty((*gate_up.shape[:-2], size))
        launch(forward_kernel, (out.numel() // size, -(-size // BLOCK)), gate_up, out, size, BLOCK=BLOCK)
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        grad, size = torch.empty_like(gate_up), gate_up.shape[-1]
        launch(backward_kernel, (grad.numel() // (2 * size), -(-size // BLOCK)), gate_up, grads[0].contiguous(), grad,
               size, BLOCK=BLOCK)
        return grad


def swiglu(gate_up: Tensor) -> Tensor:
    """As `engine.kernels.swiglu.swiglu`."""
    return _SwiGLU.apply(gate_up)


def try_out(place: Place) -> None:
    """Compiles and runs all of it on something small."""
    swiglu(torch.zeros(2, 2, 8, dtype=place.dtype, device=place.device, requires_grad=True)).sum().backward()


def ahead() -> Iterator[Ahead]:
    """The same for every size."""
    yield Ahead(forward_kernel, ("*bf16", "*bf16", "i32"), {"BLOCK": BLOCK}, 4, 48, aligned=("size",))
    yield Ahead(backward_kernel, ("*bf16", "*bf16", "*bf16", "i32"), {"BLOCK": BLOCK}, 4, 48, aligned=("size",))
