"""The losses of PPO and its relatives, a number per token.

    ratio        ρ = exp(log π − log π_old)
    policy       max(−ρA, −clip(ρ, 1 − ε, 1 + ε')·A)                          Schulman et al. 2017, equation 7
      dual clip  of that, where A < 0, no more than −c·A                      Ye et al. 2020, equation 5
    value        ½·max((V − R)², (clip(V, V_old − ε, V_old + ε) − R)²)

Divergences are estimated from the two log-probabilities of one token that was drawn from π, with x their difference
log π − log π_reference (Schulman 2020, "Approximating KL divergence"):

    k1    x                    its mean is the divergence; its gradient's is nothing, so it belongs into a reward
    k2    x² / 2               its gradient's mean is the divergence's
    k3    e⁻ˣ + x − 1          never negative, mean as k1

Texts may have been drawn from something else than π_old, the old policy as the training layout computes it: another
layout's rounding, or weights of a step before.  Then w = π_old/π_generated weighs every token:

    tis          min(w, high)                    truncated importance sampling (Espeholt et al. 2018; Yao et al. 2025)
    mask         w, and nothing outside [low, high]; what is rejected leaves the denominator as well (IcePop, 2025)

of tokens, or of whole texts by the product of their tokens' w.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.config import CorrectionConfig

MOST_LOG_RATIO = 20.0              # e²⁰: more than anything that is cut later, less than what overflows


def ratio_of(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """ρ; exactly 1 where both are the same."""
    return (log_probs - old_log_probs).clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO).exp()


def policy_loss(ratio: Tensor, advantages: Tensor, clip: float, clip_high: float | None = None,
                dual_clip: float | None = None) -> Tensor:
    """The clipped loss of every token.

    Args:
        clip, clip_high: ratios count between 1 − clip and 1 + clip_high (None: the same).
        dual_clip: c; None: a token that should not have been chosen may cost any multiple of its advantage.
    """
    cut = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    loss = torch.maximum(-ratio * advantages, -cut * advantages)
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


def is_clipped(ratio: Tensor, advantages: Tensor, clip: float, clip_high: float | None = None) -> Tensor:
    """Where the loss is that of the clipped ratio, so that no gradient comes of it."""
    cut = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    return -cut * advantages > -ratio * advantages


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """Half the squared error of every token, the larger of the clipped and the plain; and where the clipped one is."""
    plain = (values - returns).square()
    if clip is None:
        return 0.5 * plain, torch.zeros_like(plain, dtype=torch.bool)
    cut = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    clipped = (cut - returns).square()
    return 0.5 * torch.maximum(plain, clipped), clipped > plain


def divergence(difference: Tensor, estimator: str) -> Tensor:
    """k1, k2 or k3 of log π − log π_reference."""
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    return difference.neg().exp() + difference - 1


def importance(old_BT: Tensor, generated_BT: Tensor, mask_BT: Tensor,
               correction: CorrectionConfig) -> tuple[Tensor, Tensor]:
    """Weights of the tokens, and which of them count.

    Args:
        old_BT, generated_BT: log-probabilities under the old policy in the training layout, and of what drew the text.
        mask_BT: bool; tokens that count so far.

    Returns:
        [B, T] both: weights in the dtype that comes in, 1 where nothing is corrected; bool.
    """
    if correction.kind == "off":
        return torch.ones_like(old_BT), mask_BT
    log_w = torch.where(mask_BT, old_BT - generated_BT, torch.zeros_like(old_BT))
    if correction.level == "sequence":
        log_w = log_w.sum(1, keepdim=True).expand_as(log_w)
    w = log_w.clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO).exp()
    if correction.kind == "tis":
        return w.clamp(max=correction.high), mask_BT
    kept = mask_BT & (w >= correction.low) & (w <= correction.high)
    return torch.where(kept, w, torch.zeros_like(w)), kept


def reduction_weights(mask_BT: Tensor, loss: str, longest: int) -> Tensor:
    """What every token's loss is multiplied by before all are summed up; the sum is divided by that of `token_counts`.

    token: one mean over all tokens.  sequence: a mean over texts of the mean over each one's tokens.  constant: a text
    is worth its tokens / `longest`, however long it is (Liu et al. 2025, "Dr. GRPO").

    Returns:
        fp32 [B, T].
    """
    mask = mask_BT.float()
    if loss == "token":
        return mask
    if loss == "constant":
        return mask / longest
    return mask / mask.sum(1, keepdim=True).clamp(min=1)
