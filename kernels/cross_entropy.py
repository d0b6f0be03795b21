"""Cross-entropy over a vocabulary that may be spread over ranks, without ever gathering the logits.

For one token with logits z and target t the loss is  lse(z) − z_t.  A rank that holds columns [first, first + n) of the
vocabulary knows its own lse and, if t falls into its columns, z_t.  So two numbers per token and rank are enough:

    lse(z) = lse over ranks of lse(z_rank)          z_t = Σ over ranks of (z_t if mine else 0)

The gradient with respect to this rank's logits is  softmax − onehot = exp(z_rank − lse) − [t mine], again local.
Columns beyond `num_valid` are padding: they take no part, and their gradient is zero.  All of it is in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Gathers a [2, tokens] tensor over the ranks that share the vocabulary: → [ranks, 2, tokens].
Gather = Callable[[Tensor], Tensor]


def cross_entropy_reference(logits: Tensor, targets: Tensor) -> Tensor:
    """Plain torch: loss per token for logits [..., V] and targets [...]."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none").view(targets.shape)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, first: int, num_valid: int, gather: Gather | None) -> Tensor:
        flat = logits.flatten(0, -2)
        valid = flat[:, :num_valid]
        local = targets.flatten() - first
        mine = (local >= 0) & (local < num_valid)
        index = torch.where(mine, local, 0).unsqueeze(1)
        if num_valid:
            lse = torch.logsumexp(valid.float(), dim=1)
            target_logit = torch.where(mine, valid.gather(1, index).squeeze(1).float(), 0.0)
        else:      # a rank whose columns are all padding
            lse = torch.full(local.shape, float("-inf"), device=logits.device)
            target_logit = torch.zeros_like(lse)
        if gather is not None:
            parts = gather(torch.stack((lse, target_logit)))
            lse, target_logit = torch.logsumexp(parts[:, 0], dim=0), parts[:, 1].sum(dim=0)
        ctx.save_for_backward(logits, lse, index, mine)
        ctx.num_valid = num_valid
        return (lse - target_logit).view(targets.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, lse, index, mine = ctx.saved_tensors
        flat = logits.flatten(0, -2)
        scale = grads[0].flatten().float().unsqueeze(1)
        grad = torch.zeros_like(flat) if ctx.num_valid < flat.shape[1] else torch.empty_like(flat)
        valid = grad[:, : ctx.num_valid]
        if ctx.num_valid:
            softmax = (flat[:, : ctx.num_valid].float() - lse.unsqueeze(1)).exp_()
            softmax.scatter_add_(1, index, -mine.to(softmax.dtype).unsqueeze(1))
            valid.copy_(softmax.mul_(scale))
        return grad.view(logits.shape), None, None, None, None


def cross_entropy(logits: Tensor, targets: Tensor, *, first: int = 0, num_valid: int | None = None,
                  gather: Gather | None = None) -> Tensor:
    """Loss per token, in fp32, shaped like `targets`.

    Args:
        logits: [..., columns] this rank's columns of the vocabulary.
        targets: [...] global token ids.
        first: global id of this rank's first column.
        num_valid: columns that are true vocabulary; the rest is padding.  None: all.
        gather: collects a [2, tokens] tensor from the ranks that share the vocabulary; None if this rank holds it all.
    """
    num_valid = logits.shape[-1] if num_valid is None else num_valid
    return _CrossEntropy.apply(logits, targets, first, num_valid, gather)
