"""From texts and what models say of their tokens to what actor and critic learn.

    numbers of tokens   log π_old, log π_reference, V       where `engine.rl.move` has brought them
    → rewards, advantages, returns, weights                 row by row, fp64, alike on every rank that has the row
    → whitening, means to log                               sums over all rows, each counted at its home

A row's *home* is the rank that answers for it among the actor's (`engine.rl.rows.owner`).  A token is learned if the
text is, if every number about it is finite, and if its importance is not rejected; what is not learned leaves the
denominators too, and tokens that are left out because of numbers are counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from engine.config import Config
from engine.config.rl import GROUP_OBJECTIVES
from engine.data.sample import Sample
from engine.distributed.collectives import all_reduce
from engine.distributed.mesh import Axis
from engine.errors import RequestError
from engine.model.fields import Field
from engine.rl import objectives
from engine.rl.advantages import gae, group_advantages, leave_one_out, moments, shape_rewards, whiten
from engine.rl.losses import divergence, importance, reduction_weights
from engine.rl.rollouts import Rollouts
from engine.rl.rows import at_places, sample_of
from engine.rl.scores import Numbers

LOG_PROBS, REFERENCE, VALUES = "log_probs", "reference", "values"
SUMS = ("tokens", "learned", "rewards", "advantages", "values", "returns", "returns²", "error", "error²", "kl",
        "tokens_left_out", "tokens_rejected")
Table = Mapping[int, Tensor]                                 # by row, a number per token


@dataclass(frozen=True)
class Experience:
    """What is learned from this rank's rows; every table has the same rows.

    Attributes:
        fields: by the field of a batch, numbers of tokens.
        counts: what each row adds to a minibatch's divisor.
        sums: for the log, over rows at home here.
        largest: for the log, the largest difference between generating and training log-probabilities at home here.
    """

    fields: Mapping[Field, Table]
    counts: Mapping[int, float]
    sums: Mapping[str, float]
    largest: float

    @staticmethod
    def nothing() -> Experience:
        """Of a rank that does not learn; it has the same sums."""
        return Experience({}, {}, dict.fromkeys(SUMS, 0.0), 0.0)

    def sample(self, rollouts: Rollouts, row: int, seq_len: int) -> Sample:
        """A row with everything about it."""
        extra = {field: at_places(rollouts, row, seq_len, table[row]) for field, table in self.fields.items()}
        return sample_of(rollouts, row, seq_len, {**extra, objectives.COUNTS: np.array(self.counts[row], np.float32)})


def gather(rollouts: Rollouts, scores: Numbers, tables: Mapping[str, Table], home: Sequence[int], coef: float,
           config: Config, world: Axis) -> Experience:
    """Works out what is learned; every rank of the job calls this, with whatever rows it has.

    Args:
        scores: of all rows, shaped.
        tables: `LOG_PROBS`, and the others where there are such.
        home: the rows at home here.
        coef: price of divergence in the reward.
    """
    rows = sorted(tables[LOG_PROBS])
    numbers = {name: _padded([table[row] for row in rows]) for name, table in tables.items()}
    old = numbers[LOG_PROBS]
    there = _mask([len(rollouts.responses[row].tokens) for row in rows])
    finite = there & torch.stack([each.isfinite() for each in numbers.values()]).all(0)
    numbers = {name: torch.where(finite, each, 0.0) for name, each in numbers.items()}
    learned, weight, made = _learned(rollouts, rows, numbers[LOG_PROBS], finite, config)
    kl = numbers[LOG_PROBS] - numbers[REFERENCE] if REFERENCE in numbers else None
    of_rows = torch.from_numpy(scores[rows]) if rows else torch.zeros(0, dtype=torch.float64)
    values = numbers.get(VALUES)
    if config.run.objective in GROUP_OBJECTIVES:
        rewards = shape_rewards(of_rows, None, there, 0.0)
        advantages = _of_groups(scores, rollouts.samples, config)[rows].unsqueeze(1) * there
        returns = None
    else:
        assert values is not None
        estimate = None if kl is None else divergence(kl, config.ppo.kl_estimator)
        rewards = shape_rewards(of_rows, estimate, there, coef)
        advantages = gae(rewards, values, there, config.ppo.gamma, config.ppo.gae_lambda)
        returns = advantages + values
    own = set(home)
    at_home = torch.tensor([row in own for row in rows], dtype=torch.bool).unsqueeze(1)
    if returns is not None and config.ppo.whiten_advantages:
        total = moments(advantages, learned & at_home)
        all_reduce(total, world)
        advantages = whiten(advantages, learned, total)
    sums = _sums(rewards, advantages, returns, values, kl, there & at_home, learned & at_home)
    sums["tokens_left_out"] = float((there & at_home & ~finite).sum())
    sums["tokens_rejected"] = float((finite & at_home & ~learned).sum())
    difference = torch.where(finite & at_home, (old.exp() - made.exp()).abs(), 0.0) if made is not None else None
    if difference is not None:
        sums["probs_diff"] = float(difference.sum())
    weights = reduction_weights(learned, config.learning.loss, config.rollout.max_new_tokens)
    fields = {objectives.OLD_LOG_PROBS: numbers[LOG_PROBS], objectives.ADVANTAGES: advantages,
              objectives.IMPORTANCE: weight, objectives.WEIGHTS: weights}
    if returns is not None and values is not None:
        fields |= {objectives.OLD_VALUES: values, objectives.RETURNS: returns}
    if REFERENCE in numbers:
        fields[objectives.REFERENCE_LOG_PROBS] = numbers[REFERENCE]
    return Experience({field: _rows_of(each, rows, rollouts) for field, each in fields.items()},
                      _counts(learned, rows, config.learning.loss), sums,
                      0.0 if difference is None or not difference.numel() else float(difference.max()))


def _learned(rollouts: Rollouts, rows: Sequence[int], old: Tensor, finite: Tensor,
             config: Config) -> tuple[Tensor, Tensor, Tensor | None]:
    """Which tokens are learned, how much each weighs, and what the generator said of them if it said anything."""
    learned = finite
    if config.rollout.mask_truncated and rows:
        learned = learned & torch.tensor([rollouts.responses[row].ended for row in rows]).unsqueeze(1)
    said = [rollouts.responses[row].log_probs for row in rows]
    if not said or not all(said):
        if said and config.rollout.correction.kind != "off":
            raise RequestError("rollout.correction weighs texts by what made them, and that gave no log-probabilities")
        return learned, torch.ones_like(old), None
    made = _padded([torch.tensor(each, dtype=torch.float64) for each in said])
    learned = learned & made.isfinite()
    made = torch.where(made.isfinite(), made, 0.0)
    weight, learned = importance(old, made, learned, config.rollout.correction)
    return learned, weight, made


def _of_groups(scores: Numbers, samples: int, config: Config) -> Tensor:
    """The advantage of every row, fp64."""
    groups = torch.from_numpy(scores).view(-1, samples)
    if config.run.objective == "rloo":
        return leave_one_out(groups).flatten()
    return group_advantages(groups, config.grpo.scale_by_std).flatten()


def _sums(rewards: Tensor, advantages: Tensor, returns: Tensor | None, values: Tensor | None, kl: Tensor | None,
          there: Tensor, learned: Tensor) -> dict[str, float]:
    """What the log's means are made of, over this rank's own rows."""
    def total(x: Tensor | None) -> float:
        return 0.0 if x is None else float(torch.where(there, x, 0.0).sum())

    error = None if returns is None or values is None else returns - values
    return {"tokens": float(there.sum()), "learned": float(learned.sum()), "rewards": total(rewards),
            "advantages": float(torch.where(learned, advantages, 0.0).sum()), "values": total(values),
            "returns": total(returns), "returns²": total(None if returns is None else returns.square()),
            "error": total(error), "error²": total(None if error is None else error.square()), "kl": total(kl)}


def _counts(learned: Tensor, rows: Sequence[int], loss: str) -> dict[int, float]:
    """What each row adds to the divisor."""
    tokens = learned.sum(1).tolist()
    return {row: float(n if loss == "token" else n > 0 if loss == "sequence" else 1)
            for row, n in zip(rows, tokens, strict=True)}


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """[B, T], fp64."""
    return pad_sequence([row.double() for row in rows], batch_first=True) if rows else torch.zeros(0, 0).double()


def _mask(lengths: Sequence[int]) -> Tensor:
    return torch.arange(max(lengths, default=0)) < torch.tensor(lengths, dtype=torch.int64).unsqueeze(1)


def _rows_of(padded: Tensor, rows: Sequence[int], rollouts: Rollouts) -> dict[int, Tensor]:
    return {row: each[: len(rollouts.responses[row].tokens)].float()
            for row, each in zip(rows, padded, strict=True)}
