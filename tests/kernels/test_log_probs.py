"""Log-probabilities and entropies: one rank, and any cut of the vocabulary, padding and empty ranks included."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from engine.kernels import log_probs
from engine.kernels.log_probs import log_probs_and_entropy, log_probs_and_entropy_reference
from tests.kernels.test_cross_entropy import CUTS, SHAPE, VOCABULARY, tokens
from tests.kit.compare import DTYPES, TOLERANCE, assert_equal, random, relative_error
from tests.kit.cut_vocabulary import play_ranks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("block", [1 << 24, 2 * VOCABULARY])
def test_equals_the_reference(dtype: torch.dtype, temperature: float, block: int,
                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_probs, "BLOCK_ELEMENTS", block)
    logits = 4 * random(*SHAPE, VOCABULARY, seed=1)
    assert_equal(lambda z: log_probs_and_entropy(z, tokens(), temperature=temperature),
                 lambda z: log_probs_and_entropy_reference(z, tokens(), temperature=temperature), [logits], dtype)


@pytest.mark.parametrize("which", [0, 1], ids=["log-probability", "entropy"])
def test_either_alone_has_its_own_gradient(which: int) -> None:
    """What the other output was used for must not matter when it was used for nothing."""
    logits = 4 * random(*SHAPE, VOCABULARY, seed=1)
    assert_equal(lambda z: log_probs_and_entropy(z, tokens())[which],
                 lambda z: log_probs_and_entropy_reference(z, tokens())[which], [logits], torch.float64)


def test_a_known_entropy() -> None:
    _, entropy = log_probs_and_entropy(torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0]))
    assert entropy.item() == pytest.approx(0.52427, abs=5e-6)


def run_ranks(logits: Tensor, cut: Sequence[int], padding: float) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """Both outputs and the logits' gradients of every rank."""
    outputs, parts = play_ranks(logits, cut, padding, lambda part, first, size, gather: log_probs_and_entropy(
        part, tokens(), first=first, num_valid=size, gather=gather))
    for pair in outputs:
        torch.autograd.backward(pair, [random(*SHAPE, seed=8 + i).to(out.dtype) for i, out in enumerate(pair)])
    return outputs, [part.grad for part in parts]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("padding", [0.0, float("inf"), float("nan")], ids=str)
def test_any_cut_of_the_vocabulary(cut: tuple[int, ...], padding: float, dtype: torch.dtype) -> None:
    logits = (4 * random(*SHAPE, VOCABULARY, seed=3)).to(dtype)
    outputs, gradients = run_ranks(logits, cut, padding)
    whole = logits.double().requires_grad_()
    want = log_probs_and_entropy_reference(whole, tokens())
    torch.autograd.backward(want, [random(*SHAPE, seed=8 + i) for i in range(2)])
    for pair in outputs:
        for got, wanted in zip(pair, want, strict=True):
            assert relative_error(got, wanted.detach()) < min(TOLERANCE[dtype], 1e-6)
    mine = torch.cat([gradient[..., :size] for gradient, size in zip(gradients, cut, strict=True)], dim=-1)
    assert mine.dtype == dtype and relative_error(mine, whole.grad) < TOLERANCE[dtype]
    assert all(gradient[..., size:].eq(0).all() for gradient, size in zip(gradients, cut, strict=True))


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_logits_cost_the_entropy_nothing(offset: float) -> None:
    """lse − Σ p·z would lose three digits here."""
    logits = (8 * random(*SHAPE, VOCABULARY, seed=4, dtype=torch.float32)).round() / 8
    shifted = (logits + offset).requires_grad_()
    _, entropy = log_probs_and_entropy(shifted, tokens())
    entropy.sum().backward()
    want = log_probs_and_entropy_reference(logits.double(), tokens())[1]
    assert relative_error(entropy.detach(), want) < 2e-6 and shifted.grad.isfinite().all()


def test_certainty_and_forbidden_tokens_are_finite() -> None:
    logits = torch.tensor([[0.0, 500.0, -500.0], [0.0, 0.0, float("-inf")]], requires_grad=True)
    log_prob, entropy = log_probs_and_entropy(logits, torch.tensor([2, 0]))
    (log_prob + entropy).sum().backward()
    assert log_prob.tolist() == pytest.approx([-1000.0, -0.6931472])
    assert entropy.tolist() == pytest.approx([0.0, 0.6931472])
    assert logits.grad.isfinite().all() and logits.grad[1, 2] == 0


def test_a_second_backward_pass_is_refused_rather_than_wrong() -> None:
    call = partial(log_probs_and_entropy, random(*SHAPE, VOCABULARY, seed=7).requires_grad_(), tokens())
    loss = call()[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()
