"""Cross-entropy over a vocabulary that may be spread over ranks, without ever gathering the logits.

For one token with logits z and target t the loss is  lse(z) − z_t.  A rank that holds columns [first, first + n) of the
vocabulary knows its own lse and, if t falls into its columns, z_t.  So two numbers per token and rank are enough:

    lse(z) = lse over ranks of lse(z_rank)          z_t = Σ over ranks of (z_t if mine else 0)

The gradient with respect to this rank's logits is again local:

    softmax − onehot = softmax(z_rank) · exp(lse(z_rank) − lse(z)) − [t mine]

lse(z) = log Z comes out beside the loss, for losses that keep it small (z-loss); its gradient is the first term alone.
so the softmax over this rank's columns is computed once, kept instead of the logits, and turned into the gradient in
place.  Columns beyond `num_valid` are padding: they take no part, and their gradient is zero.  All of it is in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.operation import Implementation, Operation, anywhere, in_triton

# Gathers a tensor over the ranks that share the vocabulary: [n, tokens] → [ranks, n, tokens].
Gather = Callable[[Tensor], Tensor]


def cross_entropy_reference(logits: Tensor, targets: Tensor, *, first: int = 0, num_valid: int | None = None,
                            gather: Gather | None = None) -> tuple[Tensor, Tensor]:
    """Plain torch; arguments and results as of `cross_entropy`."""
    wide = logits[..., :num_valid].flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    local = targets.flatten() - first
    mine = (local >= 0) & (local < wide.shape[1])
    if gather is None and num_valid is None:
        return F.cross_entropy(wide, local, reduction="none").view(targets.shape), wide.logsumexp(1).view(targets.shape)
    if not wide.shape[1]:                        # a rank whose columns are all padding: its logits take no part
        wide = F.pad(logits[..., :0].flatten(0, -2).to(wide.dtype), (0, 1), value=float("-inf"))
    lse = wide.logsumexp(1)
    target_logit = torch.where(mine, wide.gather(1, torch.where(mine, local, 0).unsqueeze(1)).squeeze(1), 0.0)
    own = torch.stack((lse, target_logit)).detach()
    everyone = own.unsqueeze(0) if gather is None else gather(own)
    total = everyone[:, 0].logsumexp(0)
    # Only what this rank's logits contribute is differentiated: ∂lse/∂lse_rank is its share of the sum of exponentials.
    share = (own[0] - total).exp()
    log_z = total + torch.where(share > 0, share * (lse - own[0]), 0.0)
    return (log_z - everyone[:, 1].sum(0) - (target_logit - own[1])).view(targets.shape), log_z.view(targets.shape)


class Columns(NamedTuple):
    """What a rank knows of each token from its own columns [tokens, n] of the vocabulary.

    Attributes:
        softmax: over these columns alone, [tokens, n].
        lse: log-sum-exp of these columns, [tokens].
        target_logit: the target's logit where it is one of these columns, else 0, [tokens].
        column: the target's column, [tokens, 1]; 0 where it is not here.
        mine: whether the target is here, [tokens].
    """

    softmax: Tensor
    lse: Tensor
    target_logit: Tensor
    column: Tensor
    mine: Tensor


def of_columns(valid: Tensor, targets: Tensor, first: int) -> Columns:
    """For logits `valid` [tokens, n] of ids first … first + n - 1; fp32, or fp64 where that came in."""
    dtype = torch.promote_types(valid.dtype, torch.float32)
    local = targets.flatten() - first
    mine = (local >= 0) & (local < valid.shape[1])
    column = torch.where(mine, local, 0).unsqueeze(1)
    softmax = torch.softmax(valid, dim=1, dtype=dtype)
    if valid.shape[1]:
        # the largest probability is 1/Σ exp(z − max), which gives the log-sum-exp without another pass of exp
        lse = valid.amax(dim=1).to(dtype) - softmax.amax(dim=1).log_()
        target_logit = torch.where(mine, valid.gather(1, column).squeeze(1).to(dtype), 0.0)
    else:      # a rank whose columns are all padding
        lse = torch.full(local.shape, float("-inf"), dtype=dtype, device=valid.device)
        target_logit = torch.zeros_like(lse)
    return Columns(softmax, lse, target_logit, column, mine)


def over_ranks(own: Tensor, gather: Gather | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """From what every rank knows of its columns to what holds for the whole vocabulary.

    Args:
        own: [2 or 3, tokens] this rank's log-sum-exp, target's logit and, if wanted, entropy.

    Returns:
        The same of all columns, [tokens] each.
    """
    if gather is None:
        return own[0], own[1], own[2] if len(own) > 2 else None
    parts = gather(own)
    lse = torch.logsumexp(parts[:, 0], dim=0)
    if len(own) == 2:
        return lse, parts[:, 1].sum(dim=0), None
    weights = (parts[:, 0] - lse).exp_()
    entropy = (weights * parts[:, 2] + torch.special.entr(weights)).sum(dim=0)
    return lse, parts[:, 1].sum(dim=0), entropy


def whole_width(grad: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A gradient of the valid columns as one of logits of this shape: nothing flows into padding."""
    grad = grad.to(dtype)
    if padding := shape[-1] - grad.shape[1]:
        grad = F.pad(grad, (0, padding))
    return grad.view(shape)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, first: int, num_valid: int,
                gather: Gather | None) -> tuple[Tensor, Tensor]:
        own = of_columns(logits.flatten(0, -2)[:, :num_valid], targets, first)
        lse, target_logit, _ = over_ranks(torch.stack((own.lse, own.target_logit)), gather)
        ctx.save_for_backward(own.softmax, (own.lse - lse).exp_(), own.column, own.mine)
        ctx.logits_shape, ctx.logits_dtype = logits.shape, logits.dtype
        ctx.set_materialize_grads(False)
        return (lse - target_logit).view(targets.shape), lse.view(targets.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        softmax, share, index, mine = ctx.saved_tensors
        of_loss, of_log_z = (None if grad is None else grad.flatten().to(softmax.dtype) for grad in grads)
        scale = torch.zeros_like(share) if of_loss is None else of_loss
        of_both = scale if of_log_z is None else scale + of_log_z
        # in place: the logits' gradient is the one buffer of their size that this step allocates.  A second backward
        # pass through the same graph is refused by autograd, which sees that a saved tensor has changed.
        grad = softmax.mul_(of_both.mul(share).unsqueeze(1))
        if grad.shape[1]:
            grad.scatter_add_(1, index, torch.where(mine, -scale, 0.0).unsqueeze(1))
        return whole_width(grad, ctx.logits_shape, ctx.logits_dtype), None, None, None, None


def cross_entropy(logits: Tensor, targets: Tensor, *, first: int = 0, num_valid: int | None = None,
                  gather: Gather | None = None) -> tuple[Tensor, Tensor]:
    """Loss per token, and the logarithm of the softmax's denominator; fp32 and shaped like `targets`, both.

    Args:
        logits: [..., columns] this rank's columns of the vocabulary.
        targets: [...] global token ids.
        first: global id of this rank's first column.
        num_valid: columns that are true vocabulary; the rest is padding.  None: all.
        gather: collects a [2, tokens] tensor from the ranks that share the vocabulary; None if this rank holds it all.
    """
    num_valid = logits.shape[-1] if num_valid is None else num_valid
    return _CrossEntropy.apply(logits, targets, first, num_valid, gather)


CROSS_ENTROPY = Operation("cross_entropy", "loss per token, the vocabulary spread over ranks", (
    Implementation("triton", in_triton("vocabulary", "cross_entropy")),
    Implementation("octant", anywhere(cross_entropy)),
    Implementation("reference", anywhere(cross_entropy_reference))))
