"""Log-probability of a token and entropy of its distribution, over a vocabulary that may be spread over ranks.

What alignment asks of a model: log π(t) for ratios of policies, and H = −Σ p·log p to see, or reward, how undecided it
is.  As in `cross_entropy` no rank ever sees another's logits.  With z = logits / temperature, a rank that holds some
columns sends three numbers per token: the log-sum-exp of its columns, the target's logit if it is there, and the
entropy h_r of the softmax over its columns alone.  The chain rule of entropy puts the last together: first choose the
rank, with probability w_r = exp(lse_r − lse), then a column of it, so

    log π(t) = z_t − lse          H = Σ_r w_r·h_r − Σ_r w_r·log w_r

in which no large number is subtracted from another.  Both gradients are local again, with p_j = w_r · softmax_j:

    ∂ log π(t) / ∂z_j = [j = t] − p_j          ∂H / ∂z_j = −p_j·(log p_j + H)

The softmax over this rank's columns is kept instead of the logits.  All of it is in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from engine.kernels.cross_entropy import Gather, of_columns, over_ranks, whole_width
from engine.kernels.operation import Implementation, Operation, anywhere, in_triton

# Rows of which p·log p, as large as the logits, is written out at a time: 64 MiB in fp32.
BLOCK_ELEMENTS = 1 << 24


def log_probs_and_entropy_reference(logits: Tensor, targets: Tensor, *, temperature: float = 1.0, first: int = 0,
                                    num_valid: int | None = None,
                                    gather: Gather | None = None) -> tuple[Tensor, Tensor]:
    """Plain torch; arguments and results as of `log_probs_and_entropy`."""
    wide = logits[..., :num_valid].to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    here = torch.arange(first, first + wide.shape[-1], device=wide.device) == targets.unsqueeze(-1)
    if gather is None:
        log_p = wide.log_softmax(-1)
        return torch.where(here, log_p, 0.0).sum(-1), -(log_p.exp() * log_p).sum(-1)
    own = wide.detach()
    parts = gather(torch.stack((own.logsumexp(-1), torch.where(here, own, 0.0).sum(-1),
                                torch.special.entr(own.softmax(-1)).sum(-1))).flatten(1))
    lse = parts[:, 0].logsumexp(0)
    weights = (parts[:, 0] - lse).exp()
    log_prob = (parts[:, 1].sum(0) - lse).view(targets.shape)
    entropy = (weights * parts[:, 2] + torch.special.entr(weights)).sum(0).view(targets.shape)
    log_p = own - lse.view(targets.shape).unsqueeze(-1)
    p = log_p.exp()

    def with_gradient(value: Tensor, gradient: Tensor) -> Tensor:
        """`value`, which is everybody's, with its derivative by this rank's logits."""
        return value + ((wide - own) * gradient).sum(-1)

    return with_gradient(log_prob, here.to(p.dtype) - p), with_gradient(entropy, -p * (log_p + entropy.unsqueeze(-1)))


def _blocks(p: Tensor) -> Iterator[slice]:
    """Rows of `p` [tokens, n], so many at a time."""
    rows = max(1, BLOCK_ELEMENTS // max(1, p.shape[1]))
    return (slice(start, start + rows) for start in range(0, len(p), rows))


class _LogProbsAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float, first: int, num_valid: int,
                gather: Gather | None) -> tuple[Tensor, Tensor]:
        valid = logits.flatten(0, -2)[:, :num_valid]
        if temperature != 1.0:
            valid = valid.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        own = of_columns(valid, targets, first)
        entropy = torch.empty_like(own.lse)
        for rows in _blocks(own.softmax):
            entropy[rows] = torch.special.entr(own.softmax[rows]).sum(1)
        lse, target_logit, whole = over_ranks(torch.stack((own.lse, own.target_logit, entropy)), gather)
        assert whole is not None
        entropy = whole
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(own.softmax, (own.lse - lse).exp_(), entropy, own.column, own.mine)
        ctx.logits_shape, ctx.logits_dtype, ctx.temperature = logits.shape, logits.dtype, temperature
        return (target_logit - lse).view(targets.shape), entropy.view(targets.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        softmax, share, entropy, index, mine = ctx.saved_tensors
        of_log_prob, of_entropy = (None if grad is None else grad.flatten().to(softmax.dtype).div(ctx.temperature)
                                   for grad in grads)
        scale = torch.zeros_like(share) if of_log_prob is None else of_log_prob
        factor = -scale if of_entropy is None else -scale - of_entropy * entropy
        p = softmax.mul_(share.unsqueeze(1))             # in place, and so once only, as in `cross_entropy`
        for rows in _blocks(p):
            surprise = None if of_entropy is None else torch.special.entr(p[rows]).mul_(of_entropy[rows].unsqueeze(1))
            p[rows].mul_(factor[rows].unsqueeze(1))
            if surprise is not None:
                p[rows].add_(surprise)
        if p.shape[1]:
            p.scatter_add_(1, index, torch.where(mine, scale, 0.0).unsqueeze(1))
        return whole_width(p, ctx.logits_shape, ctx.logits_dtype), None, None, None, None, None


def log_probs_and_entropy(logits: Tensor, targets: Tensor, *, temperature: float = 1.0, first: int = 0,
                          num_valid: int | None = None, gather: Gather | None = None) -> tuple[Tensor, Tensor]:
    """Log-probability of the target and entropy, in nats, each fp32 and shaped like `targets`.

    Args:
        logits: [..., columns] this rank's columns of the vocabulary.
        targets: [...] global token ids.
        temperature: logits are divided by it.
        first: global id of this rank's first column.
        num_valid: columns that are true vocabulary; the rest is padding.  None: all.
        gather: collects a [3, tokens] tensor from the ranks that share the vocabulary; None if this rank holds it all.
    """
    num_valid = logits.shape[-1] if num_valid is None else num_valid
    return _LogProbsAndEntropy.apply(logits, targets, temperature, first, num_valid, gather)


LOG_PROBS = Operation("log_probs", "log-probability and entropy per token, the vocabulary spread over ranks", (
    Implementation("triton", in_triton("vocabulary", "log_probs_and_entropy")),
    Implementation("octant", anywhere(log_probs_and_entropy)),
    Implementation("reference", anywhere(log_probs_and_entropy_reference))))
