"""AdamW (Loshchilov and Hutter 2019), one pass over lists of flat fp32 vectors.

With gradients g/d, d = `grad_divisor`, and the step count t of each vector:

    p ← p·(1 − lr·λ)        m ← β₁m + (1 − β₁)g        v ← β₂v + (1 − β₂)g²

    p ← p − lr · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)

Where `found_inf` is 1 nothing changes, the step count included; no number is read by the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from engine.kernels.operation import Implementation, Operation, Place, Unavailable, anywhere, in_triton

Tensors = Sequence[Tensor]


def adamw_reference(params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors, *,
                    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, grad_divisor: Tensor,
                    found_inf: Tensor) -> None:
    """Plain torch, vector by vector, in place.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: vectors of one shape in each place of the lists.
        steps: fp32 scalars, the updates made so far.
        grad_divisor, found_inf: fp32 scalars on the same device.
    """
    skip = found_inf > 0
    for p, grad, m, v, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        t = step + 1
        g = grad / grad_divisor
        new_m = betas[0] * m + (1 - betas[0]) * g
        new_v = betas[1] * v + (1 - betas[1]) * g * g
        m_hat, v_hat = new_m / (1 - betas[0] ** t), new_v / (1 - betas[1] ** t)
        new_p = p * (1 - lr * weight_decay) - lr * m_hat / (v_hat.sqrt() + eps)
        for old, new in ((p, new_p), (m, new_m), (v, new_v), (step, t)):
            old.copy_(torch.where(skip, old, new))      # 0 · NaN is NaN: the old value must be taken, not added to


def adamw_fused(params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors, *,
                lr: float, betas: tuple[float, float], eps: float, weight_decay: float, grad_divisor: Tensor,
                found_inf: Tensor) -> None:
    """Torch's fused multi-tensor kernel; arguments as of `adamw_reference`."""
    adamw(list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), [], list(steps), fused=True,
          grad_scale=grad_divisor, found_inf=found_inf, amsgrad=False, beta1=betas[0], beta2=betas[1], lr=lr,
          weight_decay=weight_decay, eps=eps, maximize=False)


def _fused(place: Place) -> object:
    if place.device.type not in ("cpu", "cuda", "meta"):
        raise Unavailable("torch has it for cpu and cuda")
    return adamw_fused


ADAMW = Operation("adamw", "the optimizer's update", (
    Implementation("triton", in_triton("adamw", "adamw")),
    Implementation("torch-fused", _fused),
    Implementation("reference", anywhere(adamw_reference))))
