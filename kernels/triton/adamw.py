"""AdamW in one pass over each vector: 28 bytes a parameter, the gradient read and not written back.

Two more bytes where a bf16 copy of the weights is written; 24 bytes where the weights are bf16 themselves, rounded by
chance, in one launch for each range of the vector that is a box of a parameter (`engine.kernels.rounding`).

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

from engine.kernels.adamw import Copies, Ranges, Tensors
from engine.kernels.operation import Place
from engine.kernels.rounding import GOLDEN, M1, M2, Counted, signed
from engine.kernels.triton.launch import Ahead, launch

BLOCK = 1024
HASH = {"M1": M1, "M2": M2, "GOLDEN": GOLDEN}


@triton.jit
def one_minus_exp(x: tl.tensor) -> tl.tensor:
    """1 − exp(x) for x ≤ 0, without cancellation: 1 − 0.999 in fp32 would have four digits."""
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5))))
    return tl.where(x > -0.1, series, 1 - tl.exp(x))


@triton.jit
def mixed(x: tl.tensor, M1: tl.constexpr, M2: tl.constexpr) -> tl.tensor:
    """The hash of `engine.kernels.rounding`, of uint32 numbers."""
    x = (x ^ (x >> 16)) * M1
    x = (x ^ (x >> 15)) * M2
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["first", "key", "run", "stride", "origin"])
def kernel(param: tl.tensor, grad: tl.tensor, exp_avg: tl.tensor, exp_avg_sq: tl.tensor, step: tl.tensor,
           copy: tl.tensor, size: tl.tensor, lr: tl.tensor, beta1: tl.tensor, rest1: tl.tensor, log_beta1: tl.tensor,
           beta2: tl.tensor, rest2: tl.tensor, log_beta2: tl.tensor, eps: tl.tensor, kept: tl.tensor,
           divisor: tl.tensor, found_inf: tl.tensor, first: tl.tensor, key: tl.tensor, run: tl.tensor,
           stride: tl.tensor, origin: tl.tensor, BLOCK: tl.constexpr, COPY: tl.constexpr, BY_CHANCE: tl.constexpr,
           M1: tl.constexpr, M2: tl.constexpr, GOLDEN: tl.constexpr) -> None:
    if tl.load(found_inf) == 0:
        j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        there, i = j < size, j + first
        t = tl.load(step) + 1
        g = tl.load(grad + i, mask=there, other=0.0) / tl.load(divisor)
        m = tl.load(exp_avg + i, mask=there, other=0.0) * beta1 + g * rest1
        v = tl.load(exp_avg_sq + i, mask=there, other=0.0) * beta2 + g * g * rest2
        m_hat = m / one_minus_exp(t * log_beta1)
        v_hat = v / one_minus_exp(t * log_beta2)
        p = tl.load(param + i, mask=there, other=0.0).to(tl.float32) * kept - lr * m_hat / (tl.sqrt(v_hat) + eps)
        if BY_CHANCE:
            at = j.to(tl.int32)
            number = (at // run * stride + at % run + origin).to(tl.uint32)
            seed = t.to(tl.int32).to(tl.uint32) * GOLDEN ^ key.to(tl.uint32)
            bits = mixed(number ^ mixed(seed, M1, M2), M1, M2) >> 16
            whole = p.to(tl.uint32, bitcast=True)
            up = ((whole + bits) & 0xFFFF0000).to(tl.float32, bitcast=True)
            p = tl.where((whole & 0x7F800000) == 0x7F800000, p, up)
        tl.store(param + i, p.to(param.dtype.element_ty), mask=there)
        tl.store(exp_avg + i, m, mask=there)
        tl.store(exp_avg_sq + i, v, mask=there)
        if COPY:
            tl.store(copy + i, p.to(copy.dtype.element_ty), mask=there)


def adamw(params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors, *, lr: float,
          betas: tuple[float, float], eps: float, weight_decay: float, grad_divisor: Tensor,
          found_inf: Tensor, copies: Copies = (), ranges: Ranges = ()) -> None:
    """As `engine.kernels.adamw.adamw_reference`, for contiguous vectors, fp32 but for weights without masters."""
    coefficients = [x for beta in betas for x in (beta, 1 - beta, log(beta) if beta else float("-inf"))]
    none: Copies = [None] * len(params)
    for i, (p, g, m, v, step, copy) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, steps, copies or none,
                                                     strict=True)):
        for each in ranges[i] if ranges else [Counted(0, p.numel(), 0, 1, 1, 0)]:
            counter = (each.key, min(each.run, each.size), signed(each.stride), signed(each.origin))
            launch(kernel, (-(-each.size // BLOCK),), p, g, m, v, step, p if copy is None else copy, each.size, lr,
                   *coefficients, eps, 1 - lr * weight_decay, grad_divisor, found_inf, each.start, *counter,
                   BLOCK=BLOCK, COPY=copy is not None, BY_CHANCE=bool(ranges), **HASH)
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
    for weights, copy, note in (("*fp32", "*fp32", "no copy"), ("*fp32", "*bf16", "bf16 copy"),
                                ("*bf16", "*bf16", "bf16 without masters")):
        yield Ahead(kernel, (weights, *["*fp32"] * 4, copy, "i32", *["fp32"] * 9, "*fp32", "*fp32", *["i32"] * 5),
                    {"BLOCK": BLOCK, "COPY": note == "bf16 copy", "BY_CHANCE": weights == "*bf16", **HASH}, 4, 64, note,
                    aligned=("size",))
