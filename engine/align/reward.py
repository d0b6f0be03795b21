"""Reward models: one score for a text, learned from comparisons (`engine.align.losses`).

The score is read at the last token of a text, whose hidden state has seen all of it.  Texts of one prompt are one
sample, so that all their pairs are in one microbatch, as InstructGPT has them: shuffled over batches, a text would be
seen K − 1 times and learned by heart (Ouyang et al. 2022, section 3.5).  The loss is a mean over prompts, of the mean
over the pairs of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.align.losses import off_centre, pairs_of, pairwise
from engine.config import Config
from engine.model.context import Batch
from engine.model.fields import END, MARGIN
from engine.model.objective import Head, Objective

MEAN, STD = "score/mean", "score/std"
SURE = (55, 65, 75, 85, 95)                          # middles of classes of σ(|Δ|), in percent


def _calibration(name: str) -> tuple[str, ...]:
    return tuple(f"{name}/{middle}" for middle in SURE)


class RewardModel(Objective):
    """What `run.objective: reward` trains.

    Logged are the loss, the share of pairs in the right order, the mean difference of their scores, and mean and
    standard deviation of all scores.  `calibration/85` is the share of right ones among pairs of which the model is 80
    to 90 % sure: σ(|Δ|), the probability that Bradley and Terry give the better one.
    """

    sums = ("loss", "accuracy", "margin", "texts", "scores", "squares", *_calibration("pairs"), *_calibration("right"))
    head = "score"
    fields = (END, MARGIN)

    def __init__(self, texts: int = 2, center: float = 0.0) -> None:
        """
        Args:
            texts: rows of a sample, the most that a prompt has.
            center: weight of `off_centre`.
        """
        self.rows_per_sample, self.center = texts, center

    def __call__(self, x_SBH: Tensor, head: Head, batch: Batch) -> Sequence[Tensor]:
        end = batch.extra[END]
        at_end = head.sum_over_sequence(torch.stack((head.scores(x_SBH).mul(end).sum(0), end.sum(0).float())))
        scores, there = at_end.unflatten(1, (-1, self.rows_per_sample))
        chosen, rejected, weights = pairs_of(scores, there > 0)
        counts = _counts(batch, head, self.rows_per_sample).unsqueeze(1)
        weights = weights * counts
        margin = batch.extra[MARGIN].unflatten(0, (-1, self.rows_per_sample))[:, :1]
        losses = pairwise(chosen, rejected, margin)
        if self.center:
            losses = losses + self.center * off_centre(chosen, rejected)
        of_pairs = ((each * weights).sum() for each in (losses, (chosen > rejected).float(), chosen - rejected))
        of_texts = ((each * there * counts).sum() for each in (torch.ones_like(scores), scores, scores.square()))
        return [head.once(each) for each in (*of_pairs, *of_texts, *_by_sureness(chosen - rejected, weights))]

    def count(self, batch: Batch) -> Tensor:
        return count_samples(batch, self.rows_per_sample)

    def numbers(self, totals: Sequence[float], divisor: float) -> dict[str, float]:
        loss, accuracy, margin, texts, scores, squares, *classes = totals
        mean = scores / max(texts, 1)
        named = zip(_calibration("calibration"), classes[:len(SURE)], classes[len(SURE):], strict=True)
        return {"loss": loss / divisor, "accuracy": accuracy / divisor, "margin": margin / divisor, MEAN: mean,
                STD: max(squares / max(texts, 1) - mean * mean, 0.0) ** 0.5,
                **{name: right / pairs for name, pairs, right in named if pairs > 0}}


def _by_sureness(difference: Tensor, weights: Tensor) -> Sequence[Tensor]:
    """Weights of all pairs and of the right ones, in classes of how sure the model is; each a scalar."""
    sure = torch.sigmoid(difference.detach().abs())
    which = (sure.sub(0.5) * 2 * len(SURE)).long().clamp(max=len(SURE) - 1)
    counted = torch.stack((weights, weights * (difference > 0))).flatten(1)
    return weights.new_zeros(2, len(SURE)).index_add_(1, which.flatten(), counted).flatten().unbind()


def count_samples(batch: Batch, rows: int) -> Tensor:
    """How many samples of so many rows each are there to learn from."""
    assert batch.loss_mask_SB is not None
    return batch.loss_mask_SB.any(0).unflatten(0, (-1, rows)).any(1).sum()


def _counts(batch: Batch, head: Head, rows: int) -> Tensor:
    """The same for each sample, 0 or 1, where this rank has only a part of the sequence."""
    assert batch.loss_mask_SB is not None
    learned = head.sum_over_sequence(batch.loss_mask_SB.sum(0).float())
    return learned.unflatten(0, (-1, rows)).sum(1).gt(0).float()


def reward_model(config: Config) -> Objective:
    """What `run.objective: reward` trains."""
    return RewardModel(config.rows_per_sample, config.reward.center)
