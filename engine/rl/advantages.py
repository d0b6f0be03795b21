"""How much better a token, or a text, was than expected.

    δ_t = r_t + γ·V_{t+1} − V_t          what the value function did not foresee; V behind the last token is 0
    A_t = δ_t + γ·λ·A_{t+1}              generalized advantage estimation (Schulman et al. 2016, equation 16)
    R_t = A_t + V_t                      what the value function learns: of the advantages as they are here, before
                                         they are whitened

    group    (s − mean of the prompt's texts) / their standard deviation     Shao et al. 2024, section 4.1
    RLOO      s − mean of the prompt's other texts                            Ahmadian et al. 2024, equation 8

*Whitening* makes a batch's advantages have mean 0 and variance 1.  It is over the tokens of the whole global batch:
every rank brings `moments` of the tokens that it counts, the sum over ranks goes into `whiten`.  The variance is the
unbiased one, of n − 1 (as in TRL and verl; lm-human-preferences has that of n).  The standard deviation of a group is
that of its scores as they are, of n, under which two texts are 1 and −1; TRL's and verl's is larger by √(n / (n − 1)),
a constant that a learning rate takes up.

Shape letters: B texts, T tokens of the longest response, P prompts, G texts of each.  Rows are padded on the right, and
a mask says which tokens are there.  Everything is in the dtype that comes in.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_STD = 1e-6                   # texts of one score have no signal: rounding must not become one
LEAST_VARIANCE = 1e-8


def shape_rewards(scores_B: Tensor, kl_BT: Tensor | None, mask_BT: Tensor, coef: float) -> Tensor:
    """A reward for every token: the price of moving away from the reference, and at the last token the text's score.

    Args:
        kl_BT: an estimate of log π/π_reference per token; None: there is no reference.

    Returns:
        [B, T]; 0 where no token is.  A text without any token gets nothing, not even its score.
    """
    rewards = torch.zeros_like(mask_BT, dtype=scores_B.dtype) if kl_BT is None else -coef * kl_BT * mask_BT
    return rewards + last_of(mask_BT) * scores_B.unsqueeze(1)


def last_of(mask_BT: Tensor) -> Tensor:
    """True at the last token of every text, bool [B, T]."""
    number = mask_BT.cumsum(1)
    return mask_BT.bool() & (number == mask_BT.sum(1, keepdim=True))


def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float) -> Tensor:
    """Advantages [B, T], 0 where no token is.  Returns of the value function are these plus the values."""
    mask = mask_BT.to(rewards_BT.dtype)
    out = torch.zeros_like(rewards_BT)
    following, value_after = out.new_zeros(len(out)), out.new_zeros(len(out))
    for t in range(out.shape[1] - 1, -1, -1):
        delta = rewards_BT[:, t] + gamma * value_after - values_BT[:, t]
        there = mask[:, t]
        out[:, t] = following = torch.where(there > 0, delta + gamma * lam * following, following)
        value_after = torch.where(there > 0, values_BT[:, t], value_after)
    return out * mask


def moments(x: Tensor, mask: Tensor) -> Tensor:
    """Number, sum and sum of squares of what the mask leaves, fp64 [3]; those of several ranks are added."""
    kept = torch.where(mask.bool(), x, torch.zeros_like(x)).double()
    return torch.stack((mask.bool().sum(dtype=torch.float64), kept.sum(), kept.square().sum()))


def whiten(x: Tensor, mask: Tensor, total: Tensor, shift_mean: bool = True) -> Tensor:
    """x with mean 0 (or its own, without `shift_mean`) and variance 1 over the batch that `total` sums up.

    Args:
        total: `moments`, over everybody.  Of fewer than two numbers, or equal ones, the spread is left alone.
    """
    count, first, second = total.tolist()
    mean = first / max(count, 1.0)
    variance = max(second - count * mean * mean, 0.0) / max(count - 1.0, 1.0)
    scale = (variance + LEAST_VARIANCE) ** -0.5 if variance > LEAST_VARIANCE else 1.0
    return ((x - mean) * scale + (0.0 if shift_mean else mean)) * mask


def group_advantages(scores_PG: Tensor, scale_by_std: bool = True) -> Tensor:
    """How much better each text is than its group's mean, in standard deviations of the group or as it is; [P, G].

    Texts that all have one score get 0.
    """
    centred = scores_PG - scores_PG.mean(1, keepdim=True)
    if not scale_by_std:
        return centred
    std = centred.square().mean(1, keepdim=True).sqrt()
    return torch.where(std > LEAST_STD, centred / std.clamp(min=LEAST_STD), torch.zeros_like(centred))


def leave_one_out(scores_PG: Tensor) -> Tensor:
    """How much better each text is than the mean of its group's others; [P, G]."""
    others = scores_PG.shape[1] - 1
    return scores_PG - (scores_PG.sum(1, keepdim=True) - scores_PG) / others


def without_signal(scores_PG: Tensor) -> Tensor:
    """Which groups teach nothing, because all of their texts have the same score; bool [P]."""
    return (scores_PG.amax(1) - scores_PG.amin(1)) <= LEAST_STD
