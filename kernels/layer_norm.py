"""LayerNorm (Ba et al. 2016): y = w · (x − mean(x)) / sqrt(var(x) + eps) + b, over the last dimension, in fp32.

With x̂ = (x − μ)·r and r = (var(x) + eps)^(-1/2) the backward pass is

    dw = Σ dy·x̂      db = Σ dy      dx = r · (dy·w − mean(dy·w) − x̂ · mean(dy·w·x̂))

As in `kernels/rms_norm.py` the sums over tokens stay in fp32 until they reach the parameter's own gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.operation import Implementation, Operation, anywhere


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Plain torch; the definition the other is tested against."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.layer_norm(wide, wide.shape[-1:], weight.to(wide.dtype), bias.to(wide.dtype), eps).to(x.dtype)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, dim=-1, correction=0, keepdim=True)
        rstd = variance.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, mean, rstd)
        return (wide - mean).mul_(rstd).mul_(weight).add_(bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        grad = grads[0].to(mean.dtype)
        x_hat = (x - mean).mul_(rstd)
        grad_weight = (grad * x_hat).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        grad_x_hat = grad * weight
        dot = torch.linalg.vecdot(grad_x_hat, x_hat).unsqueeze(-1).div_(x.shape[-1])
        grad_x = grad_x_hat.sub_(grad_x_hat.mean(-1, keepdim=True)).addcmul_(x_hat, dot, value=-1).mul_(rstd)
        return grad_x.to(x.dtype), grad_weight, grad_bias, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalises the last dimension of `x` [..., hidden], scales it by `weight` and adds `bias` [hidden]."""
    return _LayerNorm.apply(x, weight, bias, eps)


LAYER_NORM = Operation("layer_norm", "mean and variance normalisation", (
    Implementation("octant", anywhere(layer_norm)),
    Implementation("reference", anywhere(layer_norm_reference))))
