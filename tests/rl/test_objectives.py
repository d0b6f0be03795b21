"""What actor and critic learn beside the same formulas in float64, and what never reaches a sum."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.rl.optimum import best, run
from engine.config import Config, GRPOConfig, PPOConfig
from engine.distributed.mesh import Job
from engine.model.context import Batch
from engine.rl import objectives
from engine.rl.experience import LOG_PROBS, REFERENCE, VALUES, gather
from engine.rl.objectives import Policy, Value
from engine.rl.rollouts import Prompt, Response, Rollouts
from engine.rl.rows import sample_of
from tests.kit.digits import END, NUM_IDS, learner_of, rl_config
from tests.kit.distributed import job, run_distributed
from tests.rl.test_resume import rows

S, B, V = 5, 3, 7


class OneHead:
    """Logits and scores as they are given."""

    def token_losses(self, x_SBH: Tensor, labels_SB: Tensor) -> Tensor:
        return -self.token_log_probs_and_entropy(x_SBH, labels_SB)[0]

    def token_log_probs_and_entropy(self, x_SBH: Tensor, labels_SB: Tensor, temperature: float = 1.0,
                                    num_ids: int | None = None) -> tuple[Tensor, Tensor]:
        log_p = (x_SBH[..., :num_ids] / temperature).log_softmax(-1)
        return log_p.gather(-1, labels_SB.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)

    def scores(self, x_SBH: Tensor) -> Tensor:
        return x_SBH[..., 0]

    def sum_over_sequence(self, x: Tensor) -> Tensor:
        return x

    def once(self, x: Tensor) -> Tensor:
        return x


def made_batch() -> tuple[Tensor, Batch]:
    """Random numbers; where nothing is learned they are no numbers at all."""
    torch.manual_seed(3)
    x, labels = torch.randn(S, B, V, dtype=torch.float64), torch.randint(V, (S, B))
    weights = torch.tensor([[0, 1, 1], [1, 1, 0], [1, .5, 0], [0, 1, 0], [0, 0, 0.]], dtype=torch.float64)

    def field() -> Tensor:
        return torch.where(weights > 0, torch.randn(S, B, dtype=torch.float64), math.nan)

    extra = {objectives.WEIGHTS: weights, objectives.COUNTS: torch.tensor([2., 4, 1]),
             objectives.IMPORTANCE: field().abs(), **{each: field() for each in (
                 objectives.ADVANTAGES, objectives.OLD_VALUES, objectives.RETURNS)},
             objectives.OLD_LOG_PROBS: field() - 2, objectives.REFERENCE_LOG_PROBS: field() - 2}
    return x.requires_grad_(), Batch(labels, torch.zeros(S, 1, dtype=torch.int64), labels, extra=extra)


@pytest.mark.parametrize("config", [
    PPOConfig(kl_coef=0.5), PPOConfig(clip_coef=0.1, clip_coef_high=0.3, dual_clip=1.5, entropy_coef=0.2),
    GRPOConfig(kl_coef=0.3), GRPOConfig(kl_coef=0.3, kl_estimator="k2", entropy_coef=0.1)],
    ids=["PPO", "PPO, every option", "GRPO", "GRPO, k2"])
def test_the_policy_s_sums_are_the_formulas(config: PPOConfig | GRPOConfig) -> None:
    x, batch = made_batch()
    got = Policy(config, 0.7)(x, OneHead(), batch)
    want = [0.0] * 5
    high = config.clip_coef if config.clip_coef_high is None else config.clip_coef_high
    for s in range(S):
        for b in range(B):
            w, a, i, old, ref = (float(batch.extra[field][s, b]) for field in (
                objectives.WEIGHTS, objectives.ADVANTAGES, objectives.IMPORTANCE, objectives.OLD_LOG_PROBS,
                objectives.REFERENCE_LOG_PROBS))
            if w == 0:
                continue
            p = np.exp(x[s, b].detach().numpy() / 0.7)
            p /= p.sum()
            log_p = math.log(p[batch.tokens_SB[s, b]])
            ratio, entropy = math.exp(log_p - old), -float((p * np.log(p)).sum())
            pg = max(-ratio * a, -min(max(ratio, 1 - config.clip_coef), 1 + high) * a)
            pg = min(pg, -config.dual_clip * a) if config.dual_clip and a < 0 else pg
            d = log_p - ref
            kl = 0.0 if isinstance(config, PPOConfig) else d * d / 2 if config.kl_estimator == "k2" \
                else math.exp(-d) + d - 1
            coef = config.kl_coef if isinstance(config, GRPOConfig) else 0.0
            for place, number in enumerate((i * pg - config.entropy_coef * entropy + coef * kl, i * pg, old - log_p,
                                            entropy, kl)):
                want[place] += w * number
    assert [got[place].item() for place in (0, 1, 3, 4, 5)] == pytest.approx(want, rel=1e-9)
    got[0].backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert not x.grad[batch.extra[objectives.WEIGHTS] == 0].any()
    assert Policy(config, 0.7).count(batch) == 7


def test_the_value_s_sums_are_sums_and_its_count_is_the_rows() -> None:
    x, batch = made_batch()
    got = Value(0.2)(x, OneHead(), batch)
    want = 0.0
    for s, b in (batch.extra[objectives.WEIGHTS] > 0).nonzero().tolist():
        v, (old, r, w) = x[s, b, 0].item(), (float(batch.extra[field][s, b]) for field in (
            objectives.OLD_VALUES, objectives.RETURNS, objectives.WEIGHTS))
        want += w * 0.5 * max((v - r) ** 2, (min(max(v, old - .2), old + .2) - r) ** 2)
    assert got[0].item() == pytest.approx(want, rel=1e-9)
    assert Value(0.2).count(batch) == 7


def test_every_token_of_a_response_is_learned_and_no_other() -> None:
    """The end too, though it may be what rows are filled up with."""
    rollouts = Rollouts(1, (Prompt(0, (7, 8), "", {}),), 2, (Response((3, 0), True), Response((1, 2, 4, 5), False)))
    rows = [sample_of(rollouts, row, 6, {}) for row in range(2)]
    assert [row.tokens.tolist() for row in rows] == [[7, 8, 3, 0, 0, 0, 0], [7, 8, 1, 2, 4, 5, 0]]
    assert [row.loss_mask.astype(int).tolist() for row in rows if row.loss_mask is not None] == [
        [0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0]]


TEXTS = Rollouts(1, tuple(Prompt(i, (1, 2), "", {}) for i in range(4)), 1, (
    Response((3, 4, END), True), Response((5, 6, 7, 8), False), Response((9, END), True), Response((END,), True)))


def gathered(**sections: Any) -> Any:
    """What is learned of four texts; the critic foresees nothing, the reference is .1 behind everywhere."""
    config = rl_config("/nowhere", **sections)
    tables = {LOG_PROBS: {row: torch.full((n,), -1.0) for row, n in enumerate(TEXTS.lengths)},
              REFERENCE: {row: torch.full((n,), -1.1) for row, n in enumerate(TEXTS.lengths)},
              VALUES: {row: torch.full((n,), 0.25) for row, n in enumerate(TEXTS.lengths)}}
    return gather(TEXTS, np.array([1.0, 0, 0, 1]), tables, range(4), 0.5, config, Job("cpu").world)


def flat(table: Any) -> list[float]:
    return [number for row in range(4) for number in table[row].tolist()]


def test_returns_are_of_the_advantages_before_they_are_whitened() -> None:
    found = gathered(ppo={"gae_lambda": 1.0})
    returns = found.fields[objectives.RETURNS]
    assert returns[0].tolist() == pytest.approx([.85, .9, .95]) and returns[3].tolist() == pytest.approx([.95])
    white = np.array(flat(found.fields[objectives.ADVANTAGES]))
    assert white.mean() == pytest.approx(0, abs=1e-6) and white.std(ddof=1) == pytest.approx(1, rel=1e-4)
    plain = gathered(ppo={"gae_lambda": 1.0, "whiten_advantages": False})
    assert flat(plain.fields[objectives.ADVANTAGES]) == pytest.approx([r - .25 for r in flat(returns)], abs=1e-6)
    assert found.sums["rewards"] == pytest.approx(2 - .05 * 10) and found.sums["kl"] == pytest.approx(1.0)


def test_texts_that_came_to_no_end_leave_the_denominator() -> None:
    assert gathered().counts == {0: 3, 1: 4, 2: 2, 3: 1}
    for loss, counts in (("token", {0: 3, 1: 0, 2: 2, 3: 1}), ("sequence", {0: 1, 1: 0, 2: 1, 3: 1})):
        found = gathered(rollout={"mask_truncated": True}, ppo={"loss": loss})
        assert found.counts == counts and not found.fields[objectives.WEIGHTS][1].any()
        assert sum(flat(found.fields[objectives.WEIGHTS])) == pytest.approx(sum(counts.values()))


def test_what_generation_says_corrects_the_weights() -> None:
    texts = replace(TEXTS, responses=tuple(replace(each, log_probs=(-1.0 if i else -3.0,) * len(each.tokens))
                                           for i, each in enumerate(TEXTS.responses)))
    tables = {name: {row: torch.full((n,), -1.0) for row, n in enumerate(TEXTS.lengths)}
              for name in (LOG_PROBS, VALUES)}

    def found(**correction: Any) -> Any:
        config = rl_config("/nowhere", rollout={"correction": correction}, ppo={"kl_coef": 0.0})
        return gather(texts, np.ones(4), tables, range(4), 0.0, config, Job("cpu").world)

    assert flat(found(kind="tis").fields[objectives.IMPORTANCE]) == pytest.approx([2.0] * 3 + [1.0] * 7)
    assert found(kind="mask").counts == {0: 0, 1: 4, 2: 2, 3: 1} and found(kind="mask").sums["tokens_rejected"] == 3
    assert found(kind="off").largest == pytest.approx(math.exp(-1) - math.exp(-3))


def test_ppo_finds_the_best_policy_there_is() -> None:
    """A short run of benchmarks/rl/optimum.py, whose table has three prices and seeds."""
    torch.set_num_threads(1)
    got = run(0.5, 4, 60, last=20)
    assert got["p0"] == pytest.approx(2 / 7, abs=.03)
    assert (got["p"], got["kl"]) == pytest.approx(best(got["p0"], 0.5), abs=.06)
    for p0, beta in ((0.28, 0.3), (0.5, 1.0)):                                 # of log Z = p*/β − KL*
        p, kl = best(p0, beta)
        assert p / beta - kl == pytest.approx(math.log(p0 * math.exp(1 / beta) + 1 - p0))


def learn(config: Config, where: Job | None = None) -> None:
    """A whole run, on this rank."""
    learner = learner_of(config, where or job())
    try:
        learner.run()
    finally:
        learner.close()


def test_ids_outside_the_tokenizer_have_no_share_of_a_policy(tmp_path: Path) -> None:
    """What texts are drawn with is what is learned from; two of four tensor ranks have no id that can be chosen."""
    settings: dict[str, Any] = {"model": {"vocab_size": 40}, "steps": 2, "rollout": {"prompts": 4}}
    learn(alone := rl_config(tmp_path / "one", **settings), Job("cpu"))
    run_distributed(learn, 4, four := rl_config(tmp_path / "four", **settings, parallel={"tensor": 4}))
    for got, want in zip(rows(four).values(), rows(alone).values(), strict=True):
        assert want["rollout_probs_diff_max"] < 1e-5 and got["rollout_probs_diff_max"] < 1e-5
        assert want["actor/entropy"] < math.log(NUM_IDS)
        for key in ("actor/entropy", "actor/pg_loss", "actor/grad_norm", "objective/kl", "critic/score/mean"):
            assert got[key] == pytest.approx(want[key], rel=1e-5, abs=1e-6)
