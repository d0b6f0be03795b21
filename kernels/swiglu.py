"""SwiGLU (Shazeer 2020): silu(gate) · up, on the fused projection [..., 2, ffn].

Only the projection is kept for the backward pass; silu(gate) is computed again there, which costs one cheap pass and
saves an activation of the size of the feed-forward layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.operation import Implementation, Operation, anywhere, applied, in_triton


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """Plain torch."""
    gate, up = gate_up.unbind(-2)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.unbind(-2)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.unbind(-2)
        grad = torch.empty_like(gate_up)
        grad_gate, grad_up = grad.unbind(-2)
        torch.ops.aten.silu(gate, out=grad_up)
        grad_up.mul_(grads[0])
        torch.mul(grads[0], up, out=grad_gate)
        torch.ops.aten.silu_backward(grad_gate, gate, grad_input=grad_gate)
        return grad


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2, ffn] (gate, then up) → [..., ffn]."""
    return applied(_SwiGLU, gate_up)


SWIGLU = Operation("swiglu", "gated activation of the feed-forward layer", (
    Implementation("triton", in_triton("swiglu", "swiglu")),
    Implementation("octant", anywhere(swiglu)),
    Implementation("reference", anywhere(swiglu_reference))))
