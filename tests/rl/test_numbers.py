"""The formulas on numbers worked out by hand, and beside themselves written out in float64 and plain Python."""

from __future__ import annotations

import math
import random
from itertools import accumulate

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.config import CorrectionConfig, OverlongConfig, PPOConfig
from engine.kernels.operation import Place
from engine.kernels.table import choose
from engine.rl import advantages, losses
from engine.rl.coefficients import KLCoefficient, RunningMoments
from engine.rl.scores import overlong_penalty, shaped, weighted_sum


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


ALL = torch.ones(1, 4, dtype=torch.bool)


def close(got: Tensor, *want: float) -> None:
    assert got.flatten().tolist() == pytest.approx(list(want), abs=5e-5)


def test_advantages_of_one_step_and_of_many() -> None:
    close(advantages.gae(vector(0, 0, 1, 0)[None], vector(0, 1, 2, 3)[None], ALL, .5, 0.), .5, 0, .5, -3)
    values = vector(.1, .2, .3, .4)[None]
    got = advantages.gae(vector(-.01, .02, -.03, 1)[None], values, ALL, 1., .95)
    close(got, .7816, .728, .64, .6)
    close(got + values, .8816, .928, .94, 1)


def test_policy_loss_clips_what_pays() -> None:
    a, ratio = vector(1, -1, 2, -2, -1), vector(.8, 1, 1.5, .6, 9)
    close(losses.policy_loss(ratio, a, .2), -.8, 1, -2.4, 1.6, 9)
    close(losses.policy_loss(ratio, a, .2, dual_clip=3.), -.8, 1, -2.4, 1.6, 3)
    close(losses.policy_loss(ratio, a, .2, clip_high=.4), -.8, 1, -2.8, 1.6, 9)


def test_value_loss_takes_the_larger_error() -> None:
    loss, clipped = losses.value_loss(vector(.5, .5, .5), vector(.1, .5, .9), vector(1, 0, .2), .2)
    close(loss, .245, .125, .125)
    assert clipped.tolist() == [True, False, True]
    close(losses.value_loss(vector(.5), vector(.1), vector(1), None)[0], .125)


def test_divergences() -> None:
    x = vector(.3, -.2, 0, 1)
    assert losses.divergence(x, "k3").tolist() == pytest.approx([.04081822, .02140276, 0, .36787944], abs=5e-9)
    close(losses.divergence(x, "k2"), .045, .02, 0, .5)
    assert losses.divergence(x, "k1") is x


def test_the_coefficient_follows_the_divergence() -> None:
    known = [.148464, .1469437, .1469437, .1476961, .1492085, .1507364]
    seen = [*accumulate((0, 3, 6, 6.6, 12, 100), lambda c, kl: c.after(kl, 512), initial=KLCoefficient(.15, 6.))]
    assert [c.value for c in seen[1:]] == pytest.approx(known, abs=5e-8)
    assert KLCoefficient(.15).after(100, 512) == KLCoefficient(.15)
    assert seen[1].after(float("nan"), 512) == seen[1]


def test_groups() -> None:
    scores = torch.tensor([[-1., 1], [4, 4]], dtype=torch.float64)
    close(advantages.group_advantages(scores), -1, 1, 0, 0)
    close(advantages.group_advantages(10 * scores), -1, 1, 0, 0)
    close(advantages.group_advantages(10 * scores, scale_by_std=False), -10, 10, 0, 0)
    close(advantages.leave_one_out(torch.tensor([[1., 2, 6]])), -3, -1.5, 4.5)
    assert advantages.without_signal(scores).tolist() == [False, True]


def test_one_text_by_hand() -> None:
    """Four places, of which the last is none: policy, value, rewards, advantages, returns."""
    mask = torch.tensor([1, 1, 1, 0], dtype=torch.bool)
    old, new, a = vector(-1, -2, -.5, 0), vector(-.7, -2.6, -.5, 3), vector(1, -1, .5, 9)
    ratio = losses.ratio_of(new, old)
    assert losses.policy_loss(ratio, a, .2)[mask].mean().item() == pytest.approx(-.3)
    assert losses.is_clipped(ratio, a, .2)[mask].double().mean().item() == pytest.approx(2 / 3)
    assert losses.divergence(old - new, "k1")[mask].mean().item() == pytest.approx(.1)
    loss, clipped = losses.value_loss(vector(.5, .2, -.1, 7), vector(.1, .3, 0, 0), vector(1, 0, .4, 0), .2)
    assert loss[mask].mean().item() == pytest.approx(.13)
    assert clipped[mask].double().mean().item() == pytest.approx(1 / 3)
    rewards = advantages.shape_rewards(vector(1), vector(.2, -.5, 0, 8)[None], mask[None], .2)
    close(rewards, -.04, .1, 1, 0)
    values = vector(.1, .2, .3, 5)[None]
    got = advantages.gae(rewards, values, mask[None], 1., .95)
    close(got, .8817, .8650, .7, 0)
    close((got + values)[:, :3], .9817, 1.0650, 1)


def test_entropy_of_three_logits() -> None:
    operations = choose(Place(torch.device("cpu"), torch.float32, False), {})
    _, entropy = operations.log_probs(torch.tensor([[[2., 0, -1]]]), torch.tensor([[0]]))
    assert entropy.item() == pytest.approx(.52427, abs=5e-6)


def random_batch(seed: int) -> tuple[list[int], list[list[float]], list[list[float]]]:
    draw = random.Random(seed)
    lengths = [draw.randint(0, 6) for _ in range(7)]
    rows = [[[draw.gauss(0, 1) for _ in range(n)] for n in lengths] for _ in range(2)]
    return lengths, rows[0], rows[1]


def padded(rows: list[list[float]], filler: float) -> Tensor:
    longest = max(map(len, rows)) + 1
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("seed", range(5))
def test_advantages_are_sums_of_what_was_not_foreseen(seed: int) -> None:
    """Written out as the paper's sum over l of (γλ)ˡ δ; and what stands where no token is does not matter."""
    lengths, rewards, values = random_batch(seed)
    mask = padded([[1.] * n for n in lengths], 0) > 0
    got = advantages.gae(padded(rewards, 77.), padded(values, 1e9), mask, .9, .8)
    assert not got[~mask].any()
    for row, (r, v) in enumerate(zip(rewards, values, strict=True)):
        deltas = [r[t] + .9 * (v[t + 1] if t + 1 < len(v) else 0.) - v[t] for t in range(len(r))]
        want = [sum((.9 * .8) ** (u - t) * deltas[u] for u in range(t, len(r))) for t in range(len(r))]
        assert got[row, : len(r)].tolist() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_whitening_is_over_everybody_s_tokens(seed: int) -> None:
    lengths, rows, _ = random_batch(seed)
    mask, x = padded([[1.] * n for n in lengths], 0) > 0, padded(rows, 1e6)
    total = sum((advantages.moments(x[i : i + 2], mask[i : i + 2]) for i in range(0, 7, 2)), torch.zeros(3).double())
    flat = np.array([value for row in rows for value in row])
    got = advantages.whiten(x, mask, total)
    assert got[mask].tolist() == pytest.approx(((flat - flat.mean()) / (flat.var(ddof=1) + 1e-8) ** .5).tolist())
    assert not got[~mask].any()
    kept = advantages.whiten(x, mask, total, shift_mean=False)
    assert kept[mask].mean().item() == pytest.approx(flat.mean())


def test_whitening_nothing_and_one_token() -> None:
    none = torch.zeros(2, 3, dtype=torch.bool)
    assert not advantages.whiten(torch.ones(2, 3), none, advantages.moments(torch.ones(2, 3), none)).any()
    one = none.clone()
    one[0, 0] = True
    assert not advantages.whiten(5 * torch.ones(2, 3), one, advantages.moments(5 * torch.ones(2, 3), one)).any()


def test_a_score_lies_on_the_last_token_there_is() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)
    got = advantages.shape_rewards(vector(1, 2, 3), None, mask, 5.)
    assert got.tolist() == [[0, 1, 0, 0], [0, 0, 0, 2], [0, 0, 0, 0]]


OLD, MADE = vector(-1, -1, -1, -1)[None], vector(-1, -3, .5, -1)[None]         # log w: 0, 2, −1.5, 0


@pytest.mark.parametrize(("correction", "weights", "kept"), [
    ({}, [1, 1, 1, 1], [1, 1, 1, 0]),
    ({"kind": "tis"}, [1, 2, math.exp(-1.5), 1], [1, 1, 1, 0]),
    ({"kind": "mask"}, [1, 0, 0, 0], [1, 0, 0, 0]),
    ({"kind": "mask", "high": 8}, [1, math.exp(2), 0, 0], [1, 1, 0, 0]),
    ({"kind": "tis", "level": "sequence"}, [math.exp(.5)] * 4, [1, 1, 1, 0]),
    ({"kind": "mask", "level": "sequence", "high": 1.5}, [0] * 4, [0] * 4),
])
def test_what_was_drawn_from_something_else_is_weighed(correction: dict[str, object], weights: list[float],
                                                       kept: list[int]) -> None:
    mask = torch.tensor([[1, 1, 1, 0]], dtype=torch.bool)
    got, counts = losses.importance(OLD, MADE, mask, CorrectionConfig.model_validate(correction))
    close(got, *weights)
    assert counts.flatten().int().tolist() == kept


def test_means_over_tokens_texts_and_a_constant() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    assert losses.reduction_weights(mask, "token", 9).tolist() == mask.float().tolist()
    assert losses.reduction_weights(mask, "sequence", 9).sum(1).tolist() == pytest.approx([1, 1, 0])
    assert losses.reduction_weights(mask, "constant", 4).sum(1).tolist() == [.75, .25, 0]


def test_scores_are_weighed_penalised_scaled_and_clipped_in_this_order() -> None:
    total, bad = weighted_sum([np.array([1., np.nan, 3]), np.array([10., 20, np.inf])], [1., .5])
    assert total.tolist() == [6, 10, 3] and bad == 2
    config = PPOConfig(missing_eos_penalty=1., reward_clip=4.)
    got, _ = shaped(total, [True, True, False], [1, 2, 3], 3, config, RunningMoments())
    assert got.tolist() == [4, 4, 2]
    assert overlong_penalty([10, 16, 18, 20], 20, OverlongConfig(buffer=4, penalty=2.)).tolist() == [0, 0, -1, -2]


def test_running_moments_are_those_of_all_numbers() -> None:
    draw = random.Random(1)
    numbers = [draw.gauss(3, 2) for _ in range(20)]
    seen = RunningMoments()
    for at in (0, 1, 1, 7, 20):
        seen = seen.with_more(numbers[int(seen.count) : at])
    assert seen.std == pytest.approx(np.std(numbers, ddof=1), rel=1e-12)
    assert RunningMoments.of(seen.state()) == seen
    assert RunningMoments().std == RunningMoments().with_more([4., 4.]).std == 1
