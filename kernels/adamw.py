"""AdamW (Loshchilov and Hutter 2019), one pass over lists of flat fp32 vectors.

With gradients g/d, d = `grad_divisor`, and the step count t of each vector:

    p ← p·(1 − lr·λ)        m ← β₁m + (1 − β₁)g        v ← β₂v + (1 − β₂)g²

    p ← p − lr · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)

Where `found_inf` is 1 nothing changes, the step count included; no number is read by the host.

What the weights are besides is part of the pass: fp32 masters have a bf16 copy that the layers use, rounded to nearest
(28 + 2 bytes for each, where a pass of its own would read masters again: 34); weights without masters are bf16, widened
when they are read and rounded by chance when they are written (`engine.kernels.rounding`; 24 bytes).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from engine.kernels.operation import Implementation, Operation, Place, Unavailable, anywhere, in_triton
from engine.kernels.rounding import Counted, round_into

Tensors = Sequence[Tensor]
Copies = Sequence[Tensor | None]
Ranges = Sequence[Sequence[Counted]]


def adamw_reference(params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors, *,
                    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, grad_divisor: Tensor,
                    found_inf: Tensor, copies: Copies = (), ranges: Ranges = ()) -> None:
    """Plain torch, vector by vector, in place.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: vectors of one shape in each place of the lists.
        steps: fp32 scalars, the updates made so far.
        grad_divisor, found_inf: fp32 scalars on the same device.
        copies: for each vector one that gets its values in another dtype, or None; empty: none has any.
        ranges: of vectors that are bf16, what is rounded by which noise; the rest of them is padding.
    """
    skip, wide = found_inf > 0, widened(params)
    for p, grad, m, v, step in zip(wide, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        t = step + 1
        g = grad / grad_divisor
        new_m = betas[0] * m + (1 - betas[0]) * g
        new_v = betas[1] * v + (1 - betas[1]) * g * g
        m_hat, v_hat = new_m / (1 - betas[0] ** t), new_v / (1 - betas[1] ** t)
        new_p = p * (1 - lr * weight_decay) - lr * m_hat / (v_hat.sqrt() + eps)
        for old, new in ((p, new_p), (m, new_m), (v, new_v), (step, t)):
            old.copy_(torch.where(skip, old, new))      # 0 · NaN is NaN: the old value must be taken, not added to
    write(params, wide, steps, copies, ranges)


def widened(params: Tensors) -> Tensors:
    """Those that are narrow, wide; the others themselves."""
    return [p.float() if p.dtype == torch.bfloat16 else p for p in params]


def write(params: Tensors, wide: Tensors, steps: Tensors, copies: Copies, ranges: Ranges) -> None:
    """What was updated, where it belongs.  What a skipped step left alone is written as it was: it has nothing to
    round."""
    for p, w, step, own in zip(params, wide, steps, ranges, strict=True) if ranges else ():
        round_into(p, w, own, step)
    for copy, p in zip(copies, params, strict=True) if copies else ():
        if copy is not None:
            copy.copy_(p)


def adamw_fused(params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors, *,
                lr: float, betas: tuple[float, float], eps: float, weight_decay: float, grad_divisor: Tensor,
                found_inf: Tensor, copies: Copies = (), ranges: Ranges = ()) -> None:
    """Torch's fused multi-tensor kernel, and a pass for what it does not do; arguments as of `adamw_reference`."""
    wide = widened(params)
    adamw(list(wide), list(grads), list(exp_avgs), list(exp_avg_sqs), [], list(steps), fused=True,
          grad_scale=grad_divisor, found_inf=found_inf, amsgrad=False, beta1=betas[0], beta2=betas[1], lr=lr,
          weight_decay=weight_decay, eps=eps, maximize=False)
    write(params, wide, steps, copies, ranges)


def _fused(place: Place) -> object:
    if place.device.type not in ("cpu", "cuda", "meta"):
        raise Unavailable("torch has it for cpu and cuda")
    return adamw_fused


ADAMW = Operation("adamw", "the optimizer's update", (
    Implementation("triton", in_triton("adamw", "adamw")),
    Implementation("torch-fused", _fused),
    Implementation("reference", anywhere(adamw_reference))))
