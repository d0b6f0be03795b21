"""RMSNorm (Zhang and Sennrich 2019): y = w · x / sqrt(mean(x²) + eps), over the last dimension, in fp32.

The backward pass follows from x̂ = x·r with r = (mean(x²) + eps)^(-1/2):

    dw = Σ dy·x̂          dx = r · (dy·w − x̂ · mean(dy·w·x̂))

Saving x and r (one number per row) instead of autograd's chain of intermediates makes it cheaper in memory and time.
On a GPU torch has a kernel for y and r and one for dx that read and write everything once.  Its dw comes out in the
weight's dtype; a sum over all tokens of the microbatch deserves better, so that one is made here: dy·x is exact in
fp32, and the sum weighted by r is a product of a row with a matrix.

A norm stands where the residual stream is read, and mostly where something has just been added to it.  So the operation
does both: it adds, hands the sum on, and normalises it.  Backward the gradient that comes down the residual stream
joins the norm's where that is written.  What one kernel does is then no launch and no pass of its own:

    total = x + residual          out = norm(total)          d total = d stream + d norm
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.kernels.operation import Implementation, Operation, Place, anywhere, applied, in_triton, torch_operator


def add_rms_norm_reference(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Plain torch; the definition the fast version is tested against."""
    total = x if residual is None else x + residual
    wide = _widen(total)
    return total, weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _widen(x: Tensor) -> Tensor:
    """fp32, or fp64 where that came in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Passes(NamedTuple):
    """A norm, unseen by autograd.

    forward(x, weight, eps) → y, and what the backward pass needs of every row

    backward(dy, x, weight, that, wanted) → dx, which nobody else holds, and dw in fp32, or None where it is not wanted
    """

    forward: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = _widen(x)
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * rstd).to(x.dtype).mul_(weight), rstd


def _backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    grad = _widen(grad)
    x_hat = _widen(x) * rstd
    grad_x_hat = grad * weight
    dot = torch.linalg.vecdot(grad_x_hat, x_hat).unsqueeze(-1).div_(x.shape[-1])
    # a sum over tokens, so not rounded here: autograd casts it to what the parameter takes
    grad_weight = (grad * x_hat).flatten(0, -2).sum(0) if wanted else None
    return grad_x_hat.addcmul_(x_hat, dot, value=-1).mul_(rstd).to(x.dtype), grad_weight


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float,
                passes: Passes) -> tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        out, rows = passes.forward(total, weight, eps)
        ctx.save_for_backward(total, weight, rows)
        ctx.backward_pass, ctx.added = passes.backward, residual is not None
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, rows = ctx.saved_tensors
        grad_total, grad = grads
        grad_weight = None
        if grad is not None:
            grad_x, grad_weight = ctx.backward_pass(grad, total, weight, rows, ctx.needs_input_grad[2])
            grad_total = grad_x if grad_total is None else grad_x.add_(grad_total)
        return grad_total, grad_total if ctx.added else None, grad_weight, None, None


AddNormalise = Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]]


def made_of(passes: Passes) -> AddNormalise:
    """`add_rms_norm` that computes with these."""
    def passes_add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return applied(_AddRMSNorm, x, residual, weight, eps, passes)

    return passes_add_rms_norm


PLAIN = Passes(_forward, _backward)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of `x` and `residual` [..., hidden], and its norm along the last dimension times `weight` [hidden].

    Without a residual the sum is `x`: whoever goes on with that, and not with `x` itself, has its gradient join there.
    """
    return applied(_AddRMSNorm, x, residual, weight, eps, PLAIN)


def with_operators(run: Callable[..., Any], run_backward: Callable[..., Any]) -> Passes:
    """Made of torch's two operators."""
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out, rstd = run(x.contiguous(), [x.shape[-1]], weight, eps)
        return out, rstd

    def backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
        grad, x = grad.contiguous(), x.contiguous()
        grad_x = run_backward(grad, x, [x.shape[-1]], rstd, weight, [True, False])[0]
        if not wanted:
            return grad_x, None
        product = _widen(grad).mul(x).view(-1, x.shape[-1])
        return grad_x, (rstd.view(1, -1).to(product.dtype) @ product).view(-1)

    return Passes(forward, backward)


def _torch_fused(place: Place) -> AddNormalise:
    place.require(device="cuda")
    return made_of(with_operators(torch_operator("aten", "_fused_rms_norm"),
                                  torch_operator("aten", "_fused_rms_norm_backward")))


RMS_NORM = Operation("rms_norm", "addition to the residual stream, root-mean-square normalisation", (
    Implementation("triton", in_triton("rms_norm", "add_rms_norm")),
    Implementation("torch-fused", _torch_fused),
    Implementation("octant", anywhere(add_rms_norm)),
    Implementation("reference", anywhere(add_rms_norm_reference))))
