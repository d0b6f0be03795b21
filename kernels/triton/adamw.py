"""AdamW in one pass over each vector: 28 bytes a parameter, the gradient read and not written back.

Whether the step counts at all, and what gradients are divided by, are read on the device.  A skipped step stores
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import log

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.adamw import Tensors
from engine.kernels.operation import Place
from engine.kernels.triton.launch import Ahead, launch

BLOCK = 1024


@triton.jit
def one_minus_exp(x: tl.tensor) -> tl.tensor:
    """1 − exp(x) for x ≤ 0, without cancellation: 1 − 0.999 in fp32 would have four digits."""
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5))))
    return tl.where(x > -0.1, series, 1 - tl.exp(x))


@triton.jit
def kernel(param: tl.tensor, grad: tl.tensor, exp_avg: tl.tensor, exp_avg_sq: tl.tensor, step: tl.tensor,
           size: tl.tensor, lr: tl.tensor, beta1: tl.tensor, rest1: tl.tensor, log_beta1: tl.tensor, beta2: tl.tensor,
           rest2: tl.tensor, log_beta2: tl.tensor, eps: tl.tensor, kept: tl.tensor, divisor: tl.tensor,
           found_inf: tl.tensor, BLOCK: tl.constexpr) -> None:
    if tl.load(found_inf) == 0:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        there = i < size
        t = tl.load(step) + 1
        g = tl.load(grad + i, mask=there, other=0.0) / tl.load(divisor)
        m = tl.load(exp_avg + i, mask=there, other=0.0) * beta1 + g * rest1
        v = tl.load(exp_avg_sq + i, mask=there, other=0.0) * beta2 + g * g * rest2
        m_hat = m / one_minus_exp(t * log_beta1)
        v_hat = v / one_minus_exp(t * log_beta2)
        p = tl.load(param + i, mask=there, other=0.0) * kept - lr * m_hat / (tl.sqrt(v_hat) + eps)
        tl.store(param + i, p, mask=there)
        tl.store(exp_avg + i, m, mask=there)
        tl.store(exp_avg_sq + i, v, mask=there)


def adamw(params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors, *, lr: float,
          betas: tuple[float, float], eps: float, weight_decay: float, grad_divisor: Tensor,
          found_inf: Tensor) -> None:
    """As `engine.kernels.adamw.adamw_reference`, for contiguous fp32 vectors."""
    coefficients = [x for beta in betas for x in (beta, 1 - beta, log(beta) if beta else float("-inf"))]
    for p, g, m, v, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        launch(kernel, (-(-p.numel() // BLOCK),), p, g, m, v, step, p.numel(), lr, *coefficients, eps,
               1 - lr * weight_decay, grad_divisor, found_inf, BLOCK=BLOCK)
    taken = 1 - found_inf
    for step in steps:
        step.add_(taken)


def try_out(place: Place) -> None:
    """Compiles and runs all of it on something small."""
    vector, number = [torch.zeros(8, device=place.device)], torch.zeros((), device=place.device)
    adamw(vector, vector, vector, vector, [number.clone()], lr=1.0, betas=(0.9, 0.9), eps=1.0, weight_decay=0.1,
          grad_divisor=number + 1, found_inf=number)


def ahead() -> Iterator[Ahead]:
    """State in fp32, whatever the weights are."""
    yield Ahead(kernel, (*["*fp32"] * 5, "i32", *["fp32"] * 9, "*fp32", "*fp32"), {"BLOCK": BLOCK}, 4, 64,
                aligned=("size",))
