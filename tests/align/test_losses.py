"""The losses on numbers worked out by hand, and beside the same formulas written out in Python's own arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.align import losses


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


KNOWN: list[tuple[str, Tensor, list[float]]] = [
    ("pairwise", losses.pairwise(vector(.5, -.2, 0), vector(0, 0, 0)), [.47408, .79814, .69315]),
    ("pairwise with margins", losses.pairwise(vector(1.5, .8, 1), vector(1, 1, 1), vector(1, 2 / 3, 0)),
     [.97408, 1.21757, .69315]),
    ("a third", losses.pairwise(vector(.5), vector(0), vector(1 / 3)), [.61328]),
    ("all pairs", losses.all_pairs(vector(2, 1, .5, 0)[None]), [.31717]),
    ("sigmoid", losses.sigmoid(vector(.15, -.1)), [.62096, .74440]),
    ("odds ratio", losses.odds_ratio(vector(-.5, -1.2), vector(-1, -.7)), [.32030, 1.19047]),
    ("centring", losses.off_centre(vector(1, -2), vector(.5, 2)), [2.25, 0]),
    ("ipo", losses.ipo(vector(5, 0), .1), [0, 25]),
    ("hinge", losses.hinge(vector(.25, 2, -1)), [.75, 0, 2]),
]


@pytest.mark.parametrize(("name", "got", "want"), KNOWN, ids=[name for name, _, _ in KNOWN])
def test_numbers_worked_out_by_hand(name: str, got: Tensor, want: list[float]) -> None:
    assert got.tolist() == pytest.approx(want, abs=5e-6)


SMOOTHED = [(.15, .1), (-3.0, .25), (40.0, .4), (-700.0, .0)]


@pytest.mark.parametrize(("logit", "smoothing"), SMOOTHED)
def test_label_smoothing_mixes_both_orders(logit: float, smoothing: float) -> None:
    want = -(1 - smoothing) * -math.log1p(math.exp(-logit)) if logit > -700 else 700.0
    if smoothing:
        want += -smoothing * log_sigmoid(-logit)
    assert losses.sigmoid(vector(logit), smoothing).item() == pytest.approx(want, rel=1e-12)


def test_prompts_may_have_different_numbers_of_texts() -> None:
    scores = vector(2, 1, .5, 0).repeat(3, 1).requires_grad_()
    there = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
    got = losses.all_pairs(scores, there)
    three = sum(math.log1p(math.exp(-d)) for d in (1, 1.5, .5)) / 3
    assert got.tolist() == pytest.approx([.31717, three, 0], abs=5e-6)
    got.sum().backward()
    assert scores.grad is not None and scores.grad[1, 3] == 0 and (scores.grad[2] == 0).all()


@pytest.mark.parametrize("log_p", [-1e-12, -1e-9, -1e-3, -.69, -.7, -30.0, -800.0])
def test_odds_are_right_next_to_certainty_and_far_from_it(log_p: float) -> None:
    chosen = vector(log_p).requires_grad_()
    [got] = losses.odds_ratio(chosen, vector(-math.log(2)))             # odds 1 on the other side
    log_p = min(log_p, -losses.LEAST_DOUBT)
    log_odds = log_p - math.log(-math.expm1(log_p))
    want = math.log1p(math.exp(-log_odds)) if log_odds > -700 else -log_odds
    assert got.item() == pytest.approx(want, rel=1e-9)
    got.backward()
    assert chosen.grad is not None and chosen.grad.isfinite().all()


GRADIENTS: list[Callable[[Tensor, Tensor], Tensor]] = [
    losses.pairwise, losses.off_centre, losses.odds_ratio, lambda a, b: losses.all_pairs(torch.stack((a, b), 1)),
    lambda a, b: losses.sigmoid(a - b, .1), lambda a, b: losses.ipo(a - b, .2), lambda a, b: losses.hinge(a - b)]


@pytest.mark.parametrize("loss", GRADIENTS)
def test_gradients_are_those_of_finite_differences(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    a, b = vector(-.5, -1.3, -2.1).requires_grad_(), vector(-1, -.4, -3).requires_grad_()
    assert torch.autograd.gradcheck(loss, (a, b))
