"""What is logged of a step, under verl's names, from sums over the job and from what the updates said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from engine.config import Config
from engine.distributed.collectives import all_reduce
from engine.distributed.mesh import Axis
from engine.rl.cast import Member
from engine.rl.texts import Made
from engine.rl.updates import Update


def over_job(sums: Mapping[str, float], largest: Mapping[str, float], world: Axis) -> dict[str, float]:
    """Sums and maxima over all ranks; each brings the same names, in any order."""
    found: dict[str, float] = {}
    for values, op in ((sums, dist.ReduceOp.SUM), (largest, dist.ReduceOp.MAX)):
        names = sorted(values)
        total = torch.tensor([values[name] for name in names], dtype=torch.float64)
        all_reduce(total, world, op=op)
        found |= dict(zip(names, total.tolist(), strict=True))
    return found


def of_updates(member: Member, updates: Sequence[Update], changed: int, rank: int, prefix: str) -> dict[str, float]:
    """What a role's updates said, on its first rank; zeros on all others, and where it does not live.

    Means are over the updates that counted anything; `updates`: those that changed the weights.
    """
    objective = member.state.role.objective
    names = [*objective.sums, "grad_norm", "made", "updates", "first_off", "not_finite"]
    if rank != member.ranks.start or not updates:
        return {prefix + name: 0.0 for name in names}
    table = torch.stack([torch.cat((each.totals.sums, each.totals.grad_norm.view(1), each.divisor.view(1)))
                         for each in updates]).double().cpu().numpy()
    sums, norms, divisors = table[:, :-2], table[:, -2], table[:, -1]
    counted = (divisors > 0) & np.isfinite(norms)
    means = sums / np.maximum(divisors, 1)[:, None]
    total = {name: float(means[counted, place].sum()) for place, name in enumerate(objective.sums)}
    first = means[0, objective.sums.index("ratio_off")] if "ratio_off" in objective.sums else 0.0
    return {prefix + name: value for name, value in {
        **total, "grad_norm": float(norms[counted].sum()), "made": float(counted.sum()),
        "updates": float(counted[:changed].sum()), "first_off": float(first),
        "not_finite": float((~np.isfinite(norms)).sum())}.items()}


def of_texts(made: Made, shaped: Any, limit: int) -> dict[str, float]:
    """What is known of the texts on every rank."""
    rollouts = made.rollouts
    lengths = np.array(rollouts.lengths)
    found = {"critic/score/mean": float(rollouts.scores.mean()), "critic/score/max": float(rollouts.scores.max()),
             "critic/score/min": float(rollouts.scores.min()), "critic/score/learned": float(np.mean(shaped)),
             "response_length/mean": float(lengths.mean()), "response_length/max": float(lengths.max()),
             "response_length/min": float(lengths.min()),
             "response_length/clip_ratio": float(1 - np.mean(rollouts.ended)),
             "scores_not_finite": float(made.not_finite), "groups_refilled": float(made.refilled)}
    if len(rollouts.parts) > 1:
        found |= {f"critic/score/{name}": float(np.nanmean(part)) if np.isfinite(part).any() else 0.0
                  for name, part in rollouts.parts.items()}
    groups = rollouts.scores.reshape(-1, rollouts.samples)
    if rollouts.samples > 1:
        found["groups_without_signal"] = float((np.ptp(groups, axis=1) <= 1e-6).mean())
    return found


def record(job: Mapping[str, float], num_texts: int, config: Config, has_critic: bool,
           coef: float) -> dict[str, float]:
    """The means of a step."""
    tokens, learned = max(job["tokens"], 1.0), max(job["learned"], 1.0)

    def mean(name: str) -> float:
        return job[name] / max(job[name.split("/")[0] + "/made"], 1.0)

    found = {"critic/rewards/mean": job["rewards"] / num_texts, "critic/advantages/mean": job["advantages"] / learned,
             "objective/kl": job["kl"] / num_texts, "actor/pg_loss": mean("actor/pg_loss"),
             "actor/loss": mean("actor/loss"), "actor/pg_clipfrac": mean("actor/pg_clipfrac"),
             "actor/ppo_kl": mean("actor/ppo_kl"), "actor/entropy": mean("actor/entropy"),
             "actor/kl_loss": mean("actor/kl_loss"), "actor/kl_coef": coef, "actor/grad_norm": mean("actor/grad_norm"),
             "actor/updates": job["actor/updates"], "actor/first_ratio_diff": job["actor/first_off"],
             "tokens_left_out": job["tokens_left_out"], "tokens_rejected": job["tokens_rejected"]}
    if job["probs_known"]:
        found |= {"rollout_probs_diff_max": job["probs_diff_max"],
                  "rollout_probs_diff_mean": job["probs_diff"] / tokens}
    if config.learning.ptx_coef:
        found["actor/ptx_loss"] = mean("actor/ptx_loss") / config.learning.ptx_coef
    if has_critic:
        error = job["error²"] / tokens - (job["error"] / tokens) ** 2
        spread = job["returns²"] / tokens - (job["returns"] / tokens) ** 2
        found |= {"critic/vf_loss": mean("critic/loss"), "critic/vf_clipfrac": mean("critic/vf_clipfrac"),
                  "critic/values/mean": job["values"] / tokens, "critic/returns/mean": job["returns"] / tokens,
                  "critic/vf_explained_var": 1 - error / spread if spread > 0 else 0.0,
                  "critic/grad_norm": mean("critic/grad_norm")}
    return found
