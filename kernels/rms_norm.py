"""RMSNorm (Zhang and Sennrich 2019): y = w · x / sqrt(mean(x²) + eps), over the last dimension, in fp32.

The backward pass follows from x̂ = x·r with r = (mean(x²) + eps)^(-1/2):

    dw = Σ dy·x̂          dx = r · (dy·w − x̂ · mean(dy·w·x̂))

Saving x and r (one number per row) instead of autograd's chain of intermediates makes it cheaper in memory and time.
On a GPU torch has a kernel for y and r and one for dx that read and write everything once.  Its dw comes out in the
weight's dtype; a sum over all tokens of the microbatch deserves better, so that one is made here: dy·x is exact in
fp32, and the sum weighted by r is a product of a row with a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.kernels.operation import Implementation, Operation, Place, anywhere, in_triton, torch_operator


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Plain torch; the definition the fast version is tested against."""
    wide = _widen(x)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _widen(x: Tensor) -> Tensor:
    """fp32, or fp64 where that came in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _widen(x)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (wide * rstd).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        grad = _widen(grads[0])
        x_hat = _widen(x) * rstd
        grad_x_hat = grad * weight
        # torch.linalg.vecdot reads both operands once where mul + mean would write a temporary
        dot = torch.linalg.vecdot(grad_x_hat, x_hat).unsqueeze(-1).div_(x.shape[-1])
        # a sum over tokens, so not rounded here: autograd casts it to what the parameter takes
        grad_weight = (grad * x_hat).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        grad_x = grad_x_hat.addcmul_(x_hat, dot, value=-1).mul_(rstd).to(x.dtype)
        return grad_x, grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalises the last dimension of `x` [..., hidden] and scales it by `weight` [hidden]."""
    return _RMSNorm.apply(x, weight, eps)


class _TorchRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, run: Callable[..., Any],
                run_backward: Callable[..., Any]) -> Tensor:
        out, rstd = run(x, [x.shape[-1]], weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.run_backward = run_backward
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x = ctx.run_backward(grad, x, [x.shape[-1]], rstd, weight, [True, False])[0]
        grad_weight = None
        if ctx.needs_input_grad[1]:
            product = _widen(grad).mul(x).view(-1, x.shape[-1])
            grad_weight = (rstd.view(1, -1).to(product.dtype) @ product).view(-1)
        return grad_x, grad_weight, None, None, None


Normalise = Callable[[Tensor, Tensor, float], Tensor]


def with_operators(run: Callable[..., Any], run_backward: Callable[..., Any]) -> Normalise:
    """`rms_norm` made of torch's two operators."""
    def torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return _TorchRMSNorm.apply(x.contiguous(), weight, eps, run, run_backward)

    return torch_rms_norm


def _torch_fused(place: Place) -> Normalise:
    place.require(device="cuda")
    return with_operators(torch_operator("aten", "_fused_rms_norm"), torch_operator("aten", "_fused_rms_norm_backward"))


RMS_NORM = Operation("rms_norm", "root-mean-square normalisation", (
    Implementation("triton", in_triton("rms_norm", "rms_norm")),
    Implementation("torch-fused", _torch_fused),
    Implementation("octant", anywhere(rms_norm)),
    Implementation("reference", anywhere(rms_norm_reference))))
