"""What is drawn from equals what `transformers` draws from, and the draws follow it."""

from __future__ import annotations

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from engine.errors import RequestError
from engine.generate.request import Sampling
from engine.generate.sampling import Name, choose, exponential, filtered

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
    got = filtered(logits, case).softmax(-1)
    torch.testing.assert_close(got[rows], want.softmax(-1)[rows], rtol=1e-5, atol=1e-7)
    assert torch.equal(got[rows] > 0, want.softmax(-1)[rows] > 0)
    torch.testing.assert_close(got.sum(-1), torch.ones(4))


def test_draws_follow_the_probabilities() -> None:
    sampling, num_draws = Sampling(temperature=1.3, top_p=0.9, seed=5), 20_000
    logits = torch.tensor([2.0, -1.0, 0.5, 0.0, 1.0, -6.0])
    keys = [Name(0, draw, 0).at(sampling.seed, 0) for draw in range(num_draws)]
    chosen = choose(logits.expand(num_draws, 6), sampling, keys)[0].long()
    expected = filtered(logits.unsqueeze(0), sampling).softmax(-1)[0]
    found = chosen.bincount(minlength=6) / num_draws
    deviation = (expected * (1 - expected) / num_draws).sqrt()
    assert (expected == 0).sum() == 2
    assert ((found - expected).abs() <= 4 * deviation).all()


def test_noise_is_named_by_seed_step_prompt_sample_position_and_id() -> None:
    keys = [Name(step, prompt, sample).at(seed, position) for seed in range(2) for step in range(3)
            for prompt in range(10) for sample in range(3) for position in range(10)]
    noise = exponential(torch.tensor(keys), 50)
    assert len(set(keys)) == len(keys) and noise.unique().numel() == noise.numel()
    uniform = (-noise).exp().flatten()
    assert torch.histc(uniform, 10).sub(uniform.numel() / 10).abs().max() < 5 * (uniform.numel() * 0.09) ** 0.5
    assert abs(noise.mean() - 1) < 0.02 and abs(noise.var() - 1) < 0.05
    for other in (noise.roll(1, 0), noise.roll(1, 1)):                  # of neighbouring texts, of neighbouring ids
        assert abs(torch.corrcoef(torch.stack((noise.flatten(), other.flatten())))[0, 1]) < 0.02
    assert torch.equal(exponential(torch.tensor(keys[5:7]), 20), noise[5:7, :20])


def test_rounding_of_logits_hardly_ever_changes_a_draw() -> None:
    """Also in a large vocabulary, where a number looked up in the cumulative probability would move with all ids."""
    logits = torch.randn(200, 8000, generator=torch.Generator().manual_seed(0))
    nearly = logits + 1e-6 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    keys = [Name(0, row, 0).at(0, 0) for row in range(200)]
    first, second = (choose(each, Sampling(), keys) for each in (logits, nearly))
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(first[1], second[1], rtol=0, atol=1e-5)


def test_temperature_0_is_the_likeliest_and_the_limit_of_cold() -> None:
    logits = some_logits()[:3]
    likeliest = choose(logits, Sampling(temperature=0), [0] * 3)[0]
    assert torch.equal(likeliest.long(), logits.argmax(-1))
    assert torch.equal(choose(logits, Sampling(temperature=1e-30), [1, 2, 3])[0], likeliest)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0},
                                   {"top_p": 1.1}, {"repetition_penalty": 0.0}], ids=str)
def test_wrong_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(RequestError, match=next(iter(wrong)).replace("_", "-")):
        Sampling(**wrong)  # type: ignore[arg-type]
