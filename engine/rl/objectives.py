"""What actor and critic learn, as objectives that any layout trains (`engine.model.objective`).

A row is a prompt and its response, padded on the right.  Everything about a token of the response stands at the place
of the token before it, whose hidden state foretells it: there the label is that token, and a value is what is expected
before it is known.

    tokens     p0  p1  p2  r0  r1  r2  ·                  ·: padding
    labels     p1  p2  r0  r1  r2  ·   ·
    mask       .   .   1   1   1   .   .

Every token brings a weight (`engine.rl.losses.reduction_weights`), 0 where it is not to be learned, and every row what
it adds to the divisor, so that means over tokens and over texts are one sum divided once.  What stands where the weight
is 0 is never looked at: it may be NaN.

A policy is over the ids of the tokenizer, in training as in making texts.  A model has a few more, to make its matrices
divisible; they cannot be chosen, and if they had a share of the softmax, old log-probabilities would not be those that
texts were drawn with, and learning would change the odds of what never happens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from engine.config import Config, GRPOConfig, PPOConfig
from engine.model.context import Batch
from engine.model.fields import END, Field
from engine.model.objective import Head, Measure, Objective
from engine.rl import losses

OLD_LOG_PROBS = Field("old_log_probs_SB")                    # under the actor before the step
REFERENCE_LOG_PROBS = Field("reference_log_probs_SB")
ADVANTAGES = Field("advantages_SB")
IMPORTANCE = Field("importance_SB")                          # π_old / π_generated, where that is corrected
OLD_VALUES = Field("old_values_SB")
RETURNS = Field("returns_SB")
WEIGHTS = Field("weights_SB")                                # of a token's loss; 0: it is not learned
COUNTS = Field("counts_B", sequence_dim=None, batch_dim=0)   # what a row adds to the divisor
PTX_WEIGHT = Field("ptx_weight_B", sequence_dim=None, batch_dim=0)       # of labels, in rows of pretraining data


class OfRows(Objective):
    """A mean over the tokens, or the texts, of a minibatch."""

    def count(self, batch: Batch) -> Tensor:
        return batch.extra[COUNTS].sum(dtype=torch.float64)


class Policy(OfRows):
    """The actor's: clipped policy loss, entropy, and divergence from a reference where the loss has that."""

    sums: ClassVar[tuple[str, ...]] = ("loss", "pg_loss", "pg_clipfrac", "ppo_kl", "entropy", "kl_loss", "ratio_off",
                                      "ptx_loss")
    fields = (OLD_LOG_PROBS, ADVANTAGES, IMPORTANCE, WEIGHTS, COUNTS, REFERENCE_LOG_PROBS)

    def __init__(self, config: PPOConfig | GRPOConfig, temperature: float, num_ids: int | None = None) -> None:
        """`num_ids`: how many can be chosen; None: all that the model has."""
        self.config, self.temperature, self.num_ids = config, temperature, num_ids
        self.kl_coef = config.kl_coef if isinstance(config, GRPOConfig) else 0.0        # of PPO it is in the reward

    def __call__(self, x_SBH: Tensor, head: Head, batch: Batch) -> Sequence[Tensor]:
        assert batch.labels_SB is not None
        config, extra = self.config, batch.extra
        if PTX_WEIGHT in extra:
            return self._of_pretraining(x_SBH, head, batch)
        log_probs, entropy = head.token_log_probs_and_entropy(x_SBH, batch.labels_SB, self.temperature,
                                                              self.num_ids)
        weights = extra[WEIGHTS]
        learned = weights > 0
        log_probs, old = (torch.where(learned, each, 0.0) for each in (log_probs, extra[OLD_LOG_PROBS]))
        advantages = torch.where(learned, extra[ADVANTAGES], 0.0)
        ratio = losses.ratio_of(log_probs, old)
        pg = extra[IMPORTANCE] * losses.policy_loss(ratio, advantages, config.clip_coef, config.clip_coef_high,
                                                    config.dual_clip)
        loss, kl = pg, torch.zeros_like(pg)
        if config.entropy_coef:
            loss = loss - config.entropy_coef * entropy
        if self.kl_coef:
            kl = losses.divergence(log_probs - torch.where(learned, extra[REFERENCE_LOG_PROBS], 0.0),
                                   config.kl_estimator)
            loss = loss + self.kl_coef * kl
        clipped = losses.is_clipped(ratio, advantages, config.clip_coef, config.clip_coef_high)
        off = (ratio - 1).abs()
        return [torch.where(learned, weights * each, 0.0).sum()
                for each in (loss, pg, clipped.float(), old - log_probs, entropy, kl, off, torch.zeros_like(pg))]

    def _of_pretraining(self, x_SBH: Tensor, head: Head, batch: Batch) -> Sequence[Tensor]:
        """The sums of a microbatch of text as it is; there is no temperature in that."""
        assert batch.labels_SB is not None and batch.loss_mask_SB is not None
        losses = head.token_losses(x_SBH, batch.labels_SB) * batch.loss_mask_SB
        loss = (losses * batch.extra[PTX_WEIGHT]).sum()
        return [loss, *(torch.zeros_like(loss) for _ in self.sums[2:]), loss.detach()]


class Value(OfRows):
    """The critic's: half the squared error, clipped."""

    sums: ClassVar[tuple[str, ...]] = ("loss", "vf_clipfrac", "value")
    head = "score"
    fields = (OLD_VALUES, RETURNS, WEIGHTS, COUNTS)

    def __init__(self, clip: float | None) -> None:
        self.clip = clip

    def __call__(self, x_SBH: Tensor, head: Head, batch: Batch) -> Sequence[Tensor]:
        extra, weights = batch.extra, batch.extra[WEIGHTS]
        learned = weights > 0
        values = torch.where(learned, head.scores(x_SBH), 0.0)
        old, returns = (torch.where(learned, extra[field], 0.0) for field in (OLD_VALUES, RETURNS))
        loss, clipped = losses.value_loss(values, old, returns, self.clip)
        return [(weights * each).sum() for each in (loss, clipped.float(), values)]


def policy(config: Config) -> Objective:
    """What the actor of `run.objective: ppo`, `grpo` and `rloo` learns."""
    return Policy(config.learning, config.rollout.temperature)


def log_probs_at(temperature: float, num_ids: int | None = None) -> Measure:
    """A `Measure`: log π(label) of every place, [S, B], as `Policy` has it."""
    def measure(x_SBH: Tensor, head: Head, batch: Batch) -> Sequence[Tensor]:
        assert batch.labels_SB is not None
        return head.token_log_probs_and_entropy(x_SBH, batch.labels_SB, temperature, num_ids)[:1]

    return measure


def values(x_SBH: Tensor, head: Head, batch: Batch) -> Sequence[Tensor]:
    """A `Measure`: the value of every place, [S, B]."""
    return [head.scores(x_SBH)]


def score_at_end(x_SBH: Tensor, head: Head, batch: Batch) -> Sequence[Tensor]:
    """A `Measure`: what a reward model says at the last token of every row, [B]; the same on all context ranks."""
    return [head.sum_over_sequence(head.scores(x_SBH).mul(batch.extra[END]).sum(0))]
