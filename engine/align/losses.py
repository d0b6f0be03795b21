"""The losses of preference learning, as functions of what a model says about whole texts.

A reward model gives a text a score s; Bradley and Terry say how probable it is that one text is preferred:

    pairwise    −log σ(s_chosen − s_rejected − m)                     margin m: Touvron et al. 2023, section 3.2.2
    K-wise      the mean of that over all pairs of K ranked texts     Ouyang et al. 2022, section 3.5
    centring    (s_chosen + s_rejected)²                              Eisenstein et al. 2023, equation 2

A policy needs no score: its own log-probabilities are one, with or without those of the model it began as.  With Δ the
difference chosen − rejected of log π(y|x) − log π_reference(y|x),

    sigmoid     −(1 − ε)·log σ(βΔ) − ε·log σ(−βΔ)                     Rafailov et al. 2023; ε: Mitchell 2023
    ipo         (Δ − 1/(2β))², of means over tokens                   Azar et al. 2023, section 5.2
    hinge       max(0, 1 − βΔ)                                        Zhao et al. 2023
    odds ratio  −log σ(log odds(y_chosen) − log odds(y_rejected))     Hong et al. 2024; odds(y) = p/(1 − p), where
                                                                      log p is the mean over the tokens of y

All take and return tensors of one shape, a number per pair (per prompt, for K-wise), in the dtype they come in.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# A text of which every token is certain has infinite odds; nearer to certainty than this counts as this.
LEAST_DOUBT = 1e-6


def pairwise(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """How surprising it is that the chosen text was preferred, by at least `margin`."""
    difference = chosen - rejected
    return F.softplus(-(difference if margin is None else difference - margin))


def pairs_of(scores_PK: Tensor, there_PK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of a prompt's texts, best first: the better's scores, the worse's, and weights for a mean over them.

    Args:
        there_PK: False where a prompt has fewer texts than K; one with a single text has no pair, and weights of 0.

    Returns:
        [P, K·(K − 1)/2] each.
    """
    better, worse = torch.triu_indices(scores_PK.shape[1], scores_PK.shape[1], offset=1, device=scores_PK.device)
    chosen, rejected = scores_PK[:, better], scores_PK[:, worse]
    if there_PK is None:
        return chosen, rejected, torch.full_like(chosen, 1 / chosen.shape[1])
    counts = (there_PK[:, better] & there_PK[:, worse]).to(chosen.dtype)
    return chosen, rejected, counts / counts.sum(1, keepdim=True).clamp(min=1)


def all_pairs(scores_PK: Tensor, there_PK: Tensor | None = None) -> Tensor:
    """Mean of `pairwise` over all pairs of a prompt's texts, best first: [P, K] → [P]."""
    chosen, rejected, weights = pairs_of(scores_PK, there_PK)
    return (pairwise(chosen, rejected) * weights).sum(1)


def off_centre(chosen: Tensor, rejected: Tensor) -> Tensor:
    """How far the scores of a pair are from having mean 0: preferences alone leave it open."""
    return (chosen + rejected).square()


def sigmoid(logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """DPO's loss of βΔ, where a share `label_smoothing` of the preferences is taken to be the wrong way round."""
    losses = F.softplus(-logits)
    return losses if label_smoothing == 0.0 else losses + label_smoothing * logits


def ipo(difference: Tensor, beta: float) -> Tensor:
    """Pulls Δ (of means over tokens) to 1/(2β), and not beyond."""
    return (difference - 1 / (2 * beta)).square()


def hinge(logits: Tensor) -> Tensor:
    """Nothing any more where βΔ is 1."""
    return F.relu(1 - logits)


def odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """ORPO's loss of the mean log-probabilities of a token in two texts."""
    return F.softplus(_log_odds(rejected) - _log_odds(chosen))


def _log_odds(log_p: Tensor) -> Tensor:
    """log p − log(1 − p), exact at both ends (Mächler 2012)."""
    log_p = log_p.clamp(max=-LEAST_DOUBT)
    certain = log_p > -math.log(2)
    # `where` on the inside: the branch that is not taken must have no infinite gradient.
    near = torch.log(-torch.expm1(torch.where(certain, log_p, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(certain, -1.0, log_p)))
    return log_p - torch.where(certain, near, far)
