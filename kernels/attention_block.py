"""Attention of some queries to some keys, to be merged with other keys later: what ring attention is made of.

Softmax over all keys can be computed block by block.  With the output O_j and log-sum-exp L_j of each block of keys,

    L = log Σ exp L_j          O = Σ exp(L_j − L) · O_j

and backward, given the *final* L and O, every block's gradients are those of ordinary flash attention, because the
probabilities exp(S − L) are already the final ones (Dao et al. 2022, section 3.1; Liu et al. 2023).

Queries are [B, H, S, D], keys and values [B, G, T, D] with G dividing H; log-sum-exps are fp32 [B, H, S].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels.operation import Implementation, Operation, Place, anywhere, torch_operator


class AttentionBlock(NamedTuple):
    """Both directions of one block.

    forward(q, k, v, *, causal) → output [B, H, S, D], log-sum-exp [B, H, S]

        causal: query i sees keys 0 … i (S = T).

    backward(grad, q, k, v, out, lse, *, causal) → gradients of the block's q, k, v, given the final output
    and log-sum-exp of its queries.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def block_forward_reference(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Plain torch, scores written out."""
    scores = _scores(q, k, causal)
    lse = torch.logsumexp(scores, -1)
    probabilities = (scores - lse.unsqueeze(-1)).exp()
    return (probabilities @ _expand(v, q)).to(q.dtype), lse


def block_backward_reference(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *,
                             causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Plain torch, scores written out."""
    probabilities = (_scores(q, k, causal) - lse.unsqueeze(-1)).exp()
    wide = _widen(grad)
    delta = (wide * _widen(out)).sum(-1, keepdim=True)
    grad_scores = probabilities * (wide @ _expand(v, q).transpose(-1, -2) - delta) * q.shape[-1] ** -0.5
    grad_q = grad_scores @ _expand(k, q)
    grad_k = (grad_scores.transpose(-1, -2) @ _widen(q)).unflatten(1, (k.shape[1], -1)).sum(2)
    grad_v = (probabilities.transpose(-1, -2) @ wide).unflatten(1, (k.shape[1], -1)).sum(2)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _widen(x: Tensor) -> Tensor:
    """fp32, or fp64 where that came in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    scores = _widen(q) @ _expand(k, q).transpose(-1, -2) * q.shape[-1] ** -0.5
    if not causal:
        return scores
    return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), float("-inf"))


def _expand(x: Tensor, q: Tensor) -> Tensor:
    """Widened, each group repeated for its query heads."""
    return _widen(x).repeat_interleave(q.shape[1] // x.shape[1], dim=1)


REFERENCE_BLOCK = AttentionBlock(block_forward_reference, block_backward_reference)


def _flash_on_cpu(place: Place) -> AttentionBlock:
    """Torch's flash attention for processors."""
    place.require(device="cpu")
    run = torch_operator("aten", "_scaled_dot_product_flash_attention_for_cpu")
    run_backward = torch_operator("aten", "_scaled_dot_product_flash_attention_for_cpu_backward")

    def forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
        return run(q, k, v, 0.0, causal)

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *,
                 causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        return run_backward(grad, q, k, v, out, lse, 0.0, causal)

    return AttentionBlock(forward, backward)


def _flash_on_cuda(place: Place) -> AttentionBlock:
    """Torch's flash attention for GPUs."""
    place.require(device="cuda", dtypes=(torch.bfloat16, torch.float16))
    run = torch_operator("aten", "_scaled_dot_product_flash_attention")
    run_backward = torch_operator("aten", "_scaled_dot_product_flash_attention_backward")

    def forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
        return run(q, k, v, 0.0, causal)[:2]

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *,
                 causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        empty = torch.empty(0, dtype=torch.int64, device=q.device)      # no dropout: no random state
        return run_backward(grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, empty, empty)

    return AttentionBlock(forward, backward)


ATTENTION_BLOCK = Operation("attention_block", "a block of ring attention", (
    Implementation("flash-cpu", _flash_on_cpu),
    Implementation("flash-cuda", _flash_on_cuda),
    Implementation("reference", anywhere(REFERENCE_BLOCK))))
