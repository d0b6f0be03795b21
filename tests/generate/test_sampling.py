"""What is drawn from equals what `transformers` draws from, and the draws follow it."""

from __future__ import annotations

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from engine.errors import RequestError
from engine.generate.request import Sampling
from engine.generate.sampling import choose, probabilities, uniform

CASES = [Sampling(temperature, top_k, top_p) for temperature in (0.3, 1.0, 2.5) for top_k in (0, 1, 7, 500)
         for top_p in (0.05, 0.5, 0.9, 1.0)]


def some_logits() -> torch.Tensor:
    """Smooth, peaked, and with many ties."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 300, generator=generator) * torch.tensor([[0.5], [3.0], [12.0]])
    return torch.cat((rows, torch.randint(0, 4, (1, 300), generator=generator).float()))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"t{c.temperature}-k{c.top_k}-p{c.top_p}")
def test_filters_are_those_of_transformers(case: Sampling) -> None:
    logits = some_logits()
    rows = slice(0, 3 if case.top_p < 1 else 4)      # which of several equals top-p keeps is an accident of sorting
    want = TemperatureLogitsWarper(case.temperature)(None, logits)
    if case.top_k:
        want = TopKLogitsWarper(case.top_k)(None, want)
    if case.top_p < 1:
        want = TopPLogitsWarper(case.top_p)(None, want)
    got = probabilities(logits, case)
    torch.testing.assert_close(got[rows], want.softmax(-1)[rows], rtol=1e-5, atol=1e-7)
    assert torch.equal(got[rows] > 0, want.softmax(-1)[rows] > 0)
    torch.testing.assert_close(got.sum(-1), torch.ones(4))


def test_draws_follow_the_probabilities() -> None:
    sampling, num_draws = Sampling(temperature=1.3, top_p=0.9, seed=5), 20_000
    logits = torch.tensor([2.0, -1.0, 0.5, 0.0, 1.0, -6.0])
    chosen = choose(logits.expand(num_draws, 6), sampling, range(num_draws), [0] * num_draws)
    expected = probabilities(logits.unsqueeze(0), sampling)[0]
    found = chosen.bincount(minlength=6) / num_draws
    deviation = (expected * (1 - expected) / num_draws).sqrt()
    assert (expected == 0).sum() == 2
    assert ((found - expected).abs() <= 4 * deviation).all()


def test_positions_and_prompts_have_numbers_of_their_own() -> None:
    numbers = [uniform(seed, prompt, position) for seed in range(3) for prompt in range(20) for position in range(50)]
    assert len(set(numbers)) == len(numbers)
    assert 0 <= min(numbers) < 0.01 < 0.99 < max(numbers) < 1
    assert sum(numbers) / len(numbers) == pytest.approx(0.5, abs=0.02)


def test_temperature_0_is_the_likeliest_and_the_limit_of_cold() -> None:
    logits = some_logits()[:3]
    likeliest = choose(logits, Sampling(temperature=0), range(3), [0] * 3)
    assert torch.equal(likeliest, logits.argmax(-1))
    assert torch.equal(choose(logits, Sampling(temperature=1e-30), range(3), [0] * 3), likeliest)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0},
                                   {"top_p": 1.1}], ids=str)
def test_wrong_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(RequestError, match=next(iter(wrong)).replace("_", "-")):
        Sampling(**wrong)  # type: ignore[arg-type]
