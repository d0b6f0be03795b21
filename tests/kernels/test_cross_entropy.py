"""Cross-entropy: one rank, and any cut of the vocabulary over ranks, padding and empty ranks included."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from engine.kernels.cross_entropy import cross_entropy, cross_entropy_reference
from tests.kit.compare import DTYPES, TOLERANCE, assert_equal, random, relative_error
from tests.kit.cut_vocabulary import play_ranks

VOCABULARY = 13
SHAPE = (6, 5)
# columns of true vocabulary on each rank; all ranks allocate as many as the largest has
CUTS = [(13,), (7, 6), (5, 5, 3), (8, 5, 0), (13, 0), (4, 4, 4, 1), (0, 13)]


def tokens() -> Tensor:
    """Every id occurs, so every rank has targets."""
    return torch.arange(SHAPE[0] * SHAPE[1]).remainder(VOCABULARY).view(SHAPE)


def weights() -> Tensor:
    """Upstream gradients, like a loss mask's zeros and like advantages of both signs."""
    upstream = random(*SHAPE, seed=2)
    upstream[1] = 0.0
    return upstream


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference(dtype: torch.dtype) -> None:
    def weighted(loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
        return lambda logits: loss(logits, tokens())[0] * weights()

    logits = 4 * random(*SHAPE, VOCABULARY, seed=1)
    assert_equal(weighted(cross_entropy), weighted(cross_entropy_reference), [logits], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_loss_is_never_in_bf16(dtype: torch.dtype) -> None:
    logits = random(*SHAPE, VOCABULARY, seed=1, dtype=dtype)
    assert all(each.dtype == torch.promote_types(dtype, torch.float32) for each in cross_entropy(logits, tokens()))


def run_ranks(logits: Tensor, cut: Sequence[int], padding: float) -> tuple[list[Tensor], list[Tensor]]:
    """Losses and logits' gradients of every rank."""
    pairs, parts = play_ranks(logits, cut, padding, lambda part, first, size, gather: cross_entropy(
        part, tokens(), first=first, num_valid=size, gather=gather))
    losses = [with_z_loss(*pair) for pair in pairs]
    for loss in losses:
        loss.backward(weights().to(loss.dtype))
    return losses, [part.grad for part in parts]


def with_z_loss(loss: Tensor, log_z: Tensor) -> Tensor:
    return loss + 0.1 * log_z.square()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("padding", [0.0, 1e4, float("inf"), float("nan")], ids=str)
def test_any_cut_of_the_vocabulary(cut: tuple[int, ...], padding: float, dtype: torch.dtype) -> None:
    logits = (4 * random(*SHAPE, VOCABULARY, seed=3)).to(dtype)
    losses, gradients = run_ranks(logits, cut, padding)
    whole = logits.double().requires_grad_()
    loss, log_z = cross_entropy_reference(whole, tokens())
    assert torch.equal(log_z, whole.logsumexp(-1))
    want = with_z_loss(loss, log_z)
    want.backward(weights())
    for loss in losses:
        assert relative_error(loss, want.detach()) < min(TOLERANCE[dtype], 1e-6)
    mine = torch.cat([gradient[..., :size] for gradient, size in zip(gradients, cut, strict=True)], dim=-1)
    assert mine.dtype == dtype and relative_error(mine, whole.grad) < TOLERANCE[dtype]
    assert all(gradient[..., size:].eq(0).all() for gradient, size in zip(gradients, cut, strict=True))
    assert mine[1].eq(0).all(), "a masked token's gradient is zero"


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_logits_do_not_overflow(offset: float) -> None:
    logits = random(*SHAPE, VOCABULARY, seed=4, dtype=torch.float32)
    shifted = (logits + offset).requires_grad_()
    loss, _ = cross_entropy(shifted, tokens())
    loss.sum().backward()
    assert torch.allclose(loss, cross_entropy_reference(logits, tokens())[0], atol=2e-3)      # fp32's spacing at 1e4
    assert shifted.grad.isfinite().all()


def test_an_improbable_target_has_a_finite_loss() -> None:
    """Its probability underflows to zero; its loss and gradient are still right."""
    logits = torch.tensor([[0.0, 500.0, -500.0]], requires_grad=True)
    loss, _ = cross_entropy(logits, torch.tensor([2]))
    loss.backward()
    assert loss.item() == 1000.0 and torch.equal(logits.grad, torch.tensor([[0.0, 1.0, -1.0]]))


def test_forbidden_tokens_have_no_gradient() -> None:
    logits = random(2, 4, seed=5).index_fill(1, torch.tensor([3]), float("-inf")).requires_grad_()
    loss, _ = cross_entropy(logits, torch.tensor([0, 1]))
    loss.sum().backward()
    assert torch.allclose(loss, cross_entropy_reference(logits[:, :3], torch.tensor([0, 1]))[0])
    assert logits.grad[:, 3].eq(0).all() and logits.grad.isfinite().all()


def test_the_logits_are_left_alone() -> None:
    logits = random(*SHAPE, VOCABULARY, seed=6).requires_grad_()
    before = logits.detach().clone()
    sum(cross_entropy(logits, tokens())).sum().backward()
    assert torch.equal(logits.detach(), before)


def test_a_second_backward_pass_is_refused_rather_than_wrong() -> None:
    """The first one turned the saved softmax into the gradient."""
    loss = cross_entropy(random(*SHAPE, VOCABULARY, seed=7).requires_grad_(), tokens())[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()
