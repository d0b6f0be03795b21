"""Policies from comparisons, without a reward model in between: DPO and ORPO (`engine.align.losses`).

A sample is two rows, the chosen answer's and the rejected one's.  What counts is the probability of the whole answer,
so the sum over the sequence comes first and the loss behind it.  DPO compares it with that under a *reference*, the
model that the run began with: a constant of the data, which the samples bring along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from engine.align import losses
from engine.align.reward import count_samples
from engine.config import Config, DPOConfig
from engine.model.context import Batch
from engine.model.fields import REFERENCE
from engine.model.objective import Head, Objective


def answers(x_SBH: Tensor, head: Head, batch: Batch) -> tuple[Tensor, Tensor]:
    """log π(answer), and the tokens of the answer: a number per row each, the same on all context ranks."""
    assert batch.labels_SB is not None and batch.loss_mask_SB is not None
    log_probs = head.token_losses(x_SBH, batch.labels_SB).neg()
    mask = batch.loss_mask_SB
    log_p, length = head.sum_over_sequence(torch.stack(((log_probs * mask).sum(0), mask.sum(0).float())))
    return log_p, length


def log_probabilities(x_SBH: Tensor, head: Head, batch: Batch) -> Sequence[Tensor]:
    """A `Measure`: log π(answer) of every row."""
    return [answers(x_SBH, head, batch)[0]]


def _halves(of_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of the chosen and of the rejected answer of each pair."""
    chosen, rejected = of_rows.unflatten(0, (-1, 2)).unbind(1)
    return chosen, rejected


# By the names of `dpo.loss`: from log-probability ratios, per token of it for ipo.
LOSSES: Mapping[str, Callable[[Tensor, DPOConfig], Tensor]] = MappingProxyType({
    "sigmoid": lambda difference, config: losses.sigmoid(config.beta * difference, config.label_smoothing),
    "ipo": lambda difference, config: losses.ipo(difference, config.beta),
    "hinge": lambda difference, config: losses.hinge(config.beta * difference),
})


class DPO(Objective):
    """What `run.objective: dpo` trains.

    A *reward* is β·(log π(y) − log π_reference(y)), that of which the policy is the best possible one (Rafailov et al.
    2023, equation 5).  Logged are its means and those of the differences, under TRL's names.
    """

    sums = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
    fields = (REFERENCE,)
    rows_per_sample = 2

    def __init__(self, config: DPOConfig) -> None:
        self.config = config

    def __call__(self, x_SBH: Tensor, head: Head, batch: Batch) -> Sequence[Tensor]:
        log_p, length = answers(x_SBH, head, batch)
        ratio, tokens = log_p - batch.extra[REFERENCE], length.clamp(min=1)
        chosen, rejected = _halves(ratio / tokens if self.config.loss == "ipo" else ratio)
        each = LOSSES[self.config.loss](chosen - rejected, self.config)
        if self.config.sft_weight:
            each = each - self.config.sft_weight * _halves(log_p / tokens)[0]
        better, worse = (self.config.beta * half.detach() for half in _halves(ratio))
        counts = _halves(length)[0].gt(0)
        return [head.once((x * counts).sum()) for x in (each, better, worse, (better > worse).float(), better - worse)]

    def count(self, batch: Batch) -> Tensor:
        return count_samples(batch, 2)


class ORPO(Objective):
    """What `run.objective: orpo` trains: the chosen answer, and its odds against those of the rejected one.

    Needs no reference.  Logged are the loss, its two parts, and the share of pairs in the right order.
    """

    sums = ("loss", "loss/answer", "loss/odds_ratio", "accuracy")
    rows_per_sample = 2

    def __init__(self, weight: float) -> None:
        """`weight`: of the odds ratio's part; λ in the paper."""
        self.weight = weight

    def __call__(self, x_SBH: Tensor, head: Head, batch: Batch) -> Sequence[Tensor]:
        log_p, length = answers(x_SBH, head, batch)
        chosen, rejected = _halves(log_p / length.clamp(min=1))
        odds = losses.odds_ratio(chosen, rejected)
        counts = _halves(length)[0].gt(0)
        parts = (self.weight * odds - chosen, -chosen, odds, (chosen > rejected).float())
        return [head.once((x * counts).sum()) for x in parts]

    def count(self, batch: Batch) -> Tensor:
        return count_samples(batch, 2)


def dpo(config: Config) -> Objective:
    """What `run.objective: dpo` trains."""
    return DPO(config.dpo)


def orpo(config: Config) -> Objective:
    """What `run.objective: orpo` trains."""
    return ORPO(config.orpo.lambda_)
