"""Cross-entropy, log-probability and entropy, the vocabulary spread over ranks, and their gradient in place.

Forward reads the logits once.  With the largest so far m, a row keeps the running sums

    s = Σ exp(z − m)          u = Σ exp(z − m)·(m − z)

which are rescaled when m grows, so that lse = m + log s and the entropy of these columns is log s + u/s, a sum of
numbers that are not negative.  What is kept of a row is m, which is exact, and log s, which is small: probabilities
made of lse alone would be off by the rounding of lse, which may be large.  Backward reads the logits once more and
turns each into its gradient, where it stands.  **So nobody else may use the logits**; autograd is told that they have
changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from engine.kernels.cross_entropy import Gather, over_ranks
from engine.kernels.operation import Place
from engine.kernels.triton.launch import Ahead, launch

FORWARD_BLOCK, BACKWARD_BLOCK = 4096, 2048


@triton.jit
def forward_kernel(logits: tl.tensor, targets: tl.tensor, lse: tl.tensor, target_logit: tl.tensor, entropy: tl.tensor,
                   largest: tl.tensor, log_sum: tl.tensor, stride: tl.tensor, first: tl.tensor,
                   inverse_temperature: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr,
                   ENTROPY: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * stride
    most = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    spread = tl.zeros((1,), tl.float32)
    for start in range(0, SIZE, BLOCK):
        column = start + tl.arange(0, BLOCK)
        there = column < SIZE
        z = tl.load(at + column, mask=there, other=float("-inf")).to(tl.float32) * inverse_temperature
        larger = tl.maximum(most, tl.max(z, 0))
        rescale = tl.exp(most - larger)
        p = tl.exp(z - larger)
        if ENTROPY:
            gap = tl.where(total > 0, larger - most, 0.0)
            spread = (spread + gap * total) * rescale + tl.sum(tl.where(there, p * (larger - z), 0.0), 0)
        total = total * rescale + tl.sum(p, 0)
        most = larger
    one = tl.arange(0, 1)
    target = tl.load(targets + row + one) - first
    mine = (target >= 0) & (target < SIZE)
    z = tl.load(at + target, mask=mine, other=0.0).to(tl.float32) * inverse_temperature
    tl.store(largest + row + one, most)
    tl.store(log_sum + row + one, tl.log(total))
    tl.store(lse + row + one, most + tl.log(total))
    tl.store(target_logit + row + one, z)
    if ENTROPY:
        tl.store(entropy + row + one, tl.log(total) + spread / total)


@triton.jit
def backward_kernel(logits: tl.tensor, targets: tl.tensor, largest: tl.tensor, log_sum: tl.tensor, entropy: tl.tensor,
                    of_target: tl.tensor, of_softmax: tl.tensor, of_entropy: tl.tensor, size: tl.tensor,
                    stride: tl.tensor, first: tl.tensor, inverse_temperature: tl.tensor, BLOCK: tl.constexpr,
                    ENTROPY: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits + row * stride + column
    z = tl.load(at, mask=column < size, other=float("-inf")).to(tl.float32) * inverse_temperature
    log_p = (z - tl.load(largest + row)) - tl.load(log_sum + row)
    p = tl.exp(log_p)
    grad = tl.where(column == tl.load(targets + row) - first, tl.load(of_target + row), 0.0)
    grad -= p * tl.load(of_softmax + row)
    if ENTROPY:
        grad -= tl.where(p > 0, p * (log_p + tl.load(entropy + row)), 0.0) * tl.load(of_entropy + row)
    grad = tl.where(column < size, grad * inverse_temperature, 0.0)          # nothing flows into padding
    tl.store(at, grad, mask=column < stride)


class _LogProbs(torch.autograd.Function):
    """Log-probability of the targets, log Z, and with `entropy` the entropy."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float, first: int, num_valid: int,
                gather: Gather | None, entropy: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        rows, stride = targets.numel(), logits.shape[-1]
        targets_flat = targets.flatten()
        parts = torch.empty((3 if entropy else 2, rows), dtype=torch.float32, device=logits.device)
        largest, log_sum = torch.zeros((2, rows), dtype=torch.float32, device=logits.device)
        if num_valid:
            launch(forward_kernel, (rows,), logits, targets_flat, parts[0], parts[1], parts[-1], largest, log_sum,
                   stride, first, 1 / temperature, SIZE=num_valid, BLOCK=FORWARD_BLOCK, ENTROPY=entropy, num_warps=8)
        else:                                            # a rank whose columns are all padding
            parts.zero_()[0].fill_(float("-inf"))
        lse, target_logit, whole_entropy = over_ranks(parts, gather)
        if gather is not None and num_valid:
            log_sum += lse - parts[0]
        ctx.save_for_backward(logits, targets_flat, largest, log_sum, whole_entropy)
        ctx.cut = num_valid, stride, first, 1 / temperature
        ctx.set_materialize_grads(False)
        return (target_logit - lse).view(targets.shape), lse.view(targets.shape), \
            None if whole_entropy is None else whole_entropy.view(targets.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, targets, largest, log_sum, entropy = ctx.saved_tensors
        given = [None if grad is None else grad.flatten().float() for grad in grads]
        of_target = torch.zeros_like(log_sum) if given[0] is None else given[0]
        of_softmax = of_target if given[1] is None else of_target - given[1]
        of_entropy = of_target if given[2] is None else given[2]
        launch(backward_kernel, (len(log_sum), -(-logits.shape[-1] // BACKWARD_BLOCK)), logits, targets, largest,
               log_sum, log_sum if entropy is None else entropy, of_target, of_softmax, of_entropy, *ctx.cut,
               BLOCK=BACKWARD_BLOCK, ENTROPY=given[2] is not None, num_warps=8)
        increment_version(logits)
        return logits, None, None, None, None, None, None


def cross_entropy(logits: Tensor, targets: Tensor, *, first: int = 0, num_valid: int | None = None,
                  gather: Gather | None = None) -> tuple[Tensor, Tensor]:
    """As `engine.kernels.cross_entropy.cross_entropy`; the backward pass overwrites `logits`."""
    num_valid = logits.shape[-1] if num_valid is None else num_valid
    log_prob, log_z, _ = _LogProbs.apply(logits.contiguous(), targets, 1.0, first, num_valid, gather, False)
    return -log_prob, log_z


def log_probs_and_entropy(logits: Tensor, targets: Tensor, *, temperature: float = 1.0, first: int = 0,
                          num_valid: int | None = None, gather: Gather | None = None) -> tuple[Tensor, Tensor]:
    """As `engine.kernels.log_probs.log_probs_and_entropy`; the backward pass overwrites `logits`."""
    num_valid = logits.shape[-1] if num_valid is None else num_valid
    log_prob, _, entropy = _LogProbs.apply(logits.contiguous(), targets, temperature, first, num_valid, gather, True)
    return log_prob, entropy


def try_out(place: Place) -> None:
    """Compiles and runs all of it on something small."""
    logits = torch.zeros(2, 8, dtype=place.dtype, device=place.device, requires_grad=True)
    targets = torch.zeros(2, dtype=torch.int64, device=place.device)
    cross_entropy(logits * 1, targets)[0].sum().backward()
    log_prob, entropy = log_probs_and_entropy(logits * 1, targets)
    (log_prob + entropy).sum().backward()


def ahead() -> Iterator[Ahead]:
    """Without and with entropy."""
    for entropy in (False, True):
        yield Ahead(forward_kernel, ("*bf16", "*i64", *["*fp32"] * 5, "i32", "i32", "fp32"),
                    {"SIZE": 128256, "BLOCK": FORWARD_BLOCK, "ENTROPY": entropy}, 8, 96, f"entropy: {entropy}",
                    ("stride",))
        yield Ahead(backward_kernel, ("*bf16", "*i64", *["*fp32"] * 6, "i32", "i32", "i32", "fp32"),
                    {"BLOCK": BACKWARD_BLOCK, "ENTROPY": entropy}, 8, 64, f"entropy: {entropy}", ("size", "stride"))
