"""Generation with a cache is the full forward pass, token by token; batches are single prompts; limits hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.errors import RequestError
from engine.generate.generator import Generator
from engine.generate.request import Limits, Sampling
from engine.model.context import Batch
from engine.model.transformer import Transformer
from tests.kit.models import PROMPTS, inference_model, model_config, whole_model

GREEDY, SAMPLED = Sampling(temperature=0), Sampling(temperature=0.9, top_k=40, top_p=0.95, seed=3)
VARIANTS = {"plain": {}, "tied": {"tie_embeddings": True}, "bias": {"qkv_bias": True}, "one group": {"num_kv_heads": 1},
            "scaled": {"rope_scaling": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                        "original_max_seq_len": 8}}}


@torch.no_grad()
def full_logits(model: Transformer, text: list[int]) -> Tensor:
    """Logits [T, V] of a forward pass over the whole text."""
    tokens = torch.tensor(text).unsqueeze(1)
    return model(tokens, Batch(tokens, torch.arange(len(text)).unsqueeze(1)))[:, 0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_logits_are_those_of_the_full_forward_pass(variant: str) -> None:
    config = model_config(**VARIANTS[variant])
    generator, whole = Generator(inference_model(config)), whole_model(config)
    texts = torch.randint(0, 97, (4, 20), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([9, 3, 9, 1])                     # of the part that is fed at once
    padding = 9 - lengths
    rows = [[0] * int(p) + text[:n].tolist() for p, n, text in zip(padding, lengths, texts, strict=True)]
    cache, fed = generator.new_cache(9 + 10, 4), torch.tensor(rows).T
    want = [full_logits(whole, text.tolist()) for text in texts]
    for step in range(11):
        logits = generator.next_logits(fed, cache, padding)
        assert logits is not None
        for row, length in enumerate(lengths.tolist()):
            torch.testing.assert_close(logits[row], want[row][length + step - 1], rtol=1e-5, atol=1e-5)
        fed = texts[torch.arange(4), lengths + step].unsqueeze(0)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_of_unequal_prompts_is_its_prompts_one_by_one(sampling: Sampling) -> None:
    generator = Generator(inference_model(model_config()))
    together = generator.generate(PROMPTS, sampling, Limits(12))
    alone = [generator.generate([prompt], sampling, Limits(12), first_index=number)[0]
             for number, prompt in enumerate(PROMPTS)]
    assert together == alone
    assert len({tuple(text) for text in together}) == len(PROMPTS)
    parts = [text for first in (0, 2)
             for text in generator.generate(PROMPTS[first : first + 2], sampling, Limits(12), first)]
    assert parts == together


def test_a_seed_decides_and_the_same_prompt_twice_gives_two_texts() -> None:
    generator = Generator(inference_model(model_config()))
    first, second = generator.generate([PROMPTS[0]] * 2, SAMPLED, Limits(12))
    assert first != second
    assert generator.generate([PROMPTS[0]], SAMPLED, Limits(12)) == [first]
    assert generator.generate([PROMPTS[0]], Sampling(seed=4), Limits(12)) != [first]


def test_texts_end_at_the_stop_id_each_by_itself() -> None:
    generator = Generator(inference_model(model_config()))
    free = generator.generate(PROMPTS, GREEDY, Limits(12))
    stop = free[0][4]
    stopped = generator.generate(PROMPTS, GREEDY, Limits(12, [stop]))
    for text, whole in zip(stopped, free, strict=True):
        assert text == (whole[: whole.index(stop) + 1] if stop in whole else whole)
    assert len(stopped[0]) <= 5 < max(map(len, stopped))
    assert len(list(generator.stream([PROMPTS[0]], GREEDY, Limits(12, [stop])))) == len(stopped[0])


def test_the_model_s_maximum_ends_a_text() -> None:
    generator = Generator(inference_model(model_config(max_seq_len=16)))
    texts = generator.generate([[1] * 15, [2] * 4], GREEDY, Limits(100))
    assert [len(text) for text in texts] == [1, 12]


def test_ids_that_the_tokenizer_lacks_are_never_chosen() -> None:
    model = inference_model(model_config())
    texts = Generator(model, num_ids=7).generate([[1]] * 8, Sampling(temperature=50.0), Limits(20))
    assert max(max(text) for text in texts) == 6
    assert max(max(text) for text in Generator(model).generate([[1]] * 8, Sampling(temperature=50.0), Limits(20))) > 6


@pytest.mark.parametrize(("prompts", "message"), [
    ([], "no prompt"),
    ([[1], []], "prompt 2 has 0 tokens"),
    ([[1] * 64], r"prompt 1 has 64 tokens; with the model's maximum of 64"),
    ([[96], [97]], r"prompt 2 holds the token id 97; the model's vocabulary has 97 \(0 to 96\)"),
    ([[-1]], "token id -1"),
])
def test_prompts_that_cannot_be(prompts: list[list[int]], message: str) -> None:
    generator = Generator(inference_model(model_config()))
    with pytest.raises(RequestError, match=message):
        generator.generate(prompts, GREEDY, Limits(5))


def test_no_memory_for_training_is_taken() -> None:
    model = inference_model(model_config())
    assert not model.buckets
    assert all(not parameter.requires_grad and not hasattr(parameter, "grad_slot")
               for parameter in model.chunks[0].parameters())
