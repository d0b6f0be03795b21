"""Attention of some queries to some keys, to be merged with other keys later: what ring attention is made of.

Softmax over all keys can be computed block by block.  With the output O_j and log-sum-exp L_j of each block of keys,

    L = log Σ exp L_j          O = Σ exp(L_j − L) · O_j

and backward, given the *final* L and O, every block's gradients are those of ordinary flash attention, because the
probabilities exp(S − L) are already the final ones (Dao et al. 2022, section 3.1; Liu et al. 2023).

Queries are [B, H, S, D], keys and values [B, G, T, D] with G dividing H; log-sum-exps are fp32 [B, H, S].
"""

from __future__ import annotations

import torch
from torch import Tensor

_FLASH_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_FLASH_CUDA = torch.ops.aten._scaled_dot_product_flash_attention
_FLASH_CUDA_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward


def block_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool,
                  mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output [B, H, S, D] and log-sum-exp [B, H, S] of one block.

    Args:
        causal: query i sees keys 0 … i (S = T).
        mask: bool [B or 1, 1, S, T], True where a query sees a key, instead of `causal`; a query that sees nothing here
            gets output 0 and log-sum-exp −∞.
    """
    if q.device.type == "cpu":
        bias = None if mask is None else _bias(mask, q.dtype)
        out, lse = _FLASH_CPU(q, k, v, 0.0, causal, attn_mask=bias)
        if mask is not None:
            lse = lse.masked_fill(~mask.any(-1), float("-inf"))
        return out, lse
    if mask is None and q.dtype in (torch.bfloat16, torch.float16):
        return _FLASH_CUDA(q, k, v, 0.0, causal)[:2]
    return block_forward_reference(q, k, v, causal=causal, mask=mask)


def block_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool,
                   mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block's q, k, v, given the final output and log-sum-exp of its queries."""
    if q.device.type == "cpu":
        bias = None if mask is None else _bias(mask, q.dtype)
        return _FLASH_CPU_BACKWARD(grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias)
    if mask is None and q.dtype in (torch.bfloat16, torch.float16):
        empty = torch.empty(0, dtype=torch.int64, device=q.device)      # no dropout: no random state
        return _FLASH_CUDA_BACKWARD(grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal,
                                    empty, empty)
    return block_backward_reference(grad, q, k, v, out, lse, causal=causal, mask=mask)


def block_forward_reference(q: Tensor, k: Tensor, v: Tensor, *, causal: bool,
                            mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Plain torch, scores written out."""
    scores = _scores(q, k, causal, mask)
    lse = torch.logsumexp(scores, -1)
    probabilities = (scores - lse.unsqueeze(-1)).exp().nan_to_num(0.0)
    return (probabilities @ _expand(v, q)).to(q.dtype), lse


def block_backward_reference(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool,
                             mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Plain torch, scores written out."""
    probabilities = (_scores(q, k, causal, mask) - lse.unsqueeze(-1)).exp()
    grad32 = grad.float()
    delta = (grad32 * out.float()).sum(-1, keepdim=True)
    grad_scores = probabilities * (grad32 @ _expand(v, q).transpose(-1, -2) - delta) * q.shape[-1] ** -0.5
    grad_q = grad_scores @ _expand(k, q)
    grad_k = (grad_scores.transpose(-1, -2) @ q.float()).unflatten(1, (k.shape[1], -1)).sum(2)
    grad_v = (probabilities.transpose(-1, -2) @ grad32).unflatten(1, (k.shape[1], -1)).sum(2)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _scores(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    scores = q.float() @ _expand(k, q).transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return scores if mask is None else scores.masked_fill(~mask, float("-inf"))


def _expand(x: Tensor, q: Tensor) -> Tensor:
    """fp32, each group repeated for its query heads."""
    return x.float().repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
