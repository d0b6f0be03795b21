"""Generation with a cache is the full forward pass, token by token; batches are single prompts; limits hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from engine.errors import RequestError
from engine.generate.blocks import BLOCK_TOKENS
from engine.generate.cache import Cache
from engine.generate.generator import Generator, Made
from engine.generate.request import Limits, Sampling
from engine.generate.scheduler import Plan
from engine.model.context import Batch
from engine.model.transformer import Transformer
from tests.kit.models import PROMPTS, inference_model, model_config, whole_model

GREEDY, SAMPLED = Sampling(temperature=0), Sampling(temperature=0.9, top_k=40, top_p=0.95, seed=3)
VARIANTS = {"plain": {}, "tied": {"tie_embeddings": True}, "bias": {"qkv_bias": True}, "one group": {"num_kv_heads": 1},
            "bloom": {"position": "alibi", "embedding_norm": True, "num_kv_heads": 2},
            "gemma": {"norm": "rmsnorm-1p", "norm_place": "both", "attention_softcap": 2.0, "logit_softcap": 1.5,
                      "query_pre_attn_scalar": 5, "window": 5, "full_every": 2, "rope_local_theta": 100.0},
            "scaled": {"rope_scaling": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                        "original_max_seq_len": 8}}}


@torch.no_grad()
def full_logits(model: Transformer, text: list[int]) -> Tensor:
    """Logits [T, V] of a forward pass over the whole text."""
    tokens = torch.tensor(text).unsqueeze(1)
    return model(tokens, Batch(tokens, torch.arange(len(text)).unsqueeze(1)))[:, 0]


def tokens_of(texts: list[Made]) -> list[list[int]]:
    return [text.tokens for text in texts]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_every_pass_are_those_of_the_full_forward_pass(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of prompts, coming in one after the other, in a cache that is too small for all."""
    config = model_config(**VARIANTS[variant])
    generator, whole = Generator(inference_model(config), rows=3), whole_model(config)
    compared = 0

    def watched(plan: Plan, cache: Cache) -> Tensor:
        nonlocal compared
        logits = Generator.next_logits(generator, plan, cache)
        assert logits is not None
        for row, text in zip(logits, plan.texts, strict=True):
            torch.testing.assert_close(row, full_logits(whole, text.tokens)[-1], rtol=1e-5, atol=1e-5)
        compared += len(logits)
        return logits

    monkeypatch.setattr(generator, "next_logits", watched)
    made = generator.generate(PROMPTS, SAMPLED, Limits(12), samples=2)
    assert compared == sum(len(text.tokens) for text in made) == 2 * 4 * 12


@torch.no_grad()
def test_dynamic_rope_turns_each_token_by_the_length_so_far_as_the_cache_of_transformers_has_it(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts within and beyond the original length; one cache has no room for all, so a text is fed again."""
    from transformers import DynamicCache

    from tests.kit.hugging_face import build_twin, load_twin, twin_names

    config = model_config(rope_scaling={"type": "dynamic", "factor": 4.0, "original_max_seq_len": 6})
    model = inference_model(config)
    weights = twin_names(dict(whole_model(config).named_parameters()), config.model)
    prompts = [[5, 1, 4], [3, 14, 15, 9, 2, 6, 5, 3, 5, 8], [*range(14)]]
    block_bytes = 2 * BLOCK_TOKENS * 4 * 4 * config.model.head_dim * 4         # 4 layers, 4 groups, fp32
    seen: dict[tuple[int, ...], Tensor] = {}
    for cache_bytes in (None, 6 * block_bytes):
        generator = Generator(model, cache_bytes=cache_bytes)

        def watched(plan: Plan, cache: Cache, generator: Generator = generator) -> Tensor:
            logits = Generator.next_logits(generator, plan, cache)
            assert logits is not None
            for row, text in zip(logits, plan.texts, strict=True):
                known = seen.setdefault(tuple(text.tokens), row.clone())
                torch.testing.assert_close(row, known, rtol=0, atol=1e-5 * known.abs().max().item())
            return logits

        monkeypatch.setattr(generator, "next_logits", watched)
        made = generator.generate(prompts, GREEDY, Limits(20))
        least = sum(len(prompt) - 1 + 20 for prompt in prompts)
        assert (generator.tokens_fed > least) == (cache_bytes is not None), "nobody was sent back"
    for prompt, text in zip(prompts, made, strict=True):
        twin, past = build_twin(config.model, "llama"), DynamicCache()
        load_twin(twin, weights)
        new = prompt
        for length in range(len(prompt), len(prompt) + 20):
            expected = twin(torch.tensor([new]), past_key_values=past, use_cache=True).logits[0, -1]
            found = seen[(*prompt, *text.tokens[: length - len(prompt)])]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
            new = [text.tokens[length - len(prompt)]]


def test_log_probabilities_are_those_of_the_full_forward_pass_at_the_temperature() -> None:
    generator, whole = Generator(inference_model(model_config()), num_ids=90), whole_model(model_config())
    for prompt, text in zip(PROMPTS, generator.generate(PROMPTS, SAMPLED, Limits(12)), strict=True):
        logits = full_logits(whole, [*prompt, *text.tokens])[len(prompt) - 1 : -1, :90] / SAMPLED.temperature
        want = logits.log_softmax(-1).gather(1, torch.tensor(text.tokens).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(text.log_probs), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_of_unequal_prompts_is_its_prompts_one_by_one(sampling: Sampling) -> None:
    generator = Generator(inference_model(model_config()))
    together = tokens_of(generator.generate(PROMPTS, sampling, Limits(12)))
    alone = [generator.generate([prompt], sampling, Limits(12), numbers=[number])[0].tokens
             for number, prompt in enumerate(PROMPTS)]
    assert together == alone
    assert len({tuple(text) for text in together}) == len(PROMPTS)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("blocks", [None, 5, 9])
def test_texts_do_not_depend_on_who_is_beside_them(rows: int, blocks: int | None) -> None:
    """Places and memory for one text, for some, and for all: 3 samples of each prompt, across several blocks."""
    model = inference_model(model_config())
    block_bytes = 2 * BLOCK_TOKENS * 4 * 4 * model.config.model.head_dim * 4         # 4 layers, 4 groups, fp32
    prompts, limits = [[*range(40)], [3] * 17, [2], [*range(16)]], Limits(20, [7])
    want = tokens_of(Generator(model).generate(prompts, SAMPLED, limits, samples=3))
    generator = Generator(model, rows=rows, cache_bytes=None if blocks is None else blocks * block_bytes)
    assert tokens_of(generator.generate(prompts, SAMPLED, limits, samples=3)) == want
    least = sum(len(prompt) - 1 for prompt in prompts) + sum(map(len, want))
    assert generator.tokens_fed == least or blocks is not None, "a beginning was computed twice"


def test_a_text_that_the_cache_cannot_hold_is_refused() -> None:
    generator = Generator(inference_model(model_config()), cache_bytes=1000)
    with pytest.raises(RequestError, match=r"a text of up to 48 tokens needs .* MiB of keys and values on each rank"):
        generator.generate(PROMPTS, GREEDY, Limits(30))


def test_a_seed_decides_and_samples_steps_and_prompts_have_texts_of_their_own() -> None:
    generator = Generator(inference_model(model_config()))
    samples = tokens_of(generator.generate([PROMPTS[0]] * 2, SAMPLED, Limits(12), samples=2))
    assert len({tuple(text) for text in samples}) == 4
    assert tokens_of(generator.generate([PROMPTS[0]], SAMPLED, Limits(12))) == samples[:1]
    for other in (generator.generate([PROMPTS[0]], Sampling(seed=4), Limits(12)),
                  generator.generate([PROMPTS[0]], SAMPLED, Limits(12), step=1)):
        assert other[0].tokens != samples[0]


def test_texts_end_at_the_stop_id_each_by_itself() -> None:
    generator = Generator(inference_model(model_config()))
    free = tokens_of(generator.generate(PROMPTS, GREEDY, Limits(12)))
    stop = free[0][4]
    stopped = generator.generate(PROMPTS, GREEDY, Limits(12, [stop]))
    for text, whole in zip(stopped, free, strict=True):
        assert text.tokens == (whole[: whole.index(stop) + 1] if stop in whole else whole)
        assert text.end == ("eod" if stop in whole else "length")
    lengths = [len(text.tokens) for text in stopped]
    assert lengths[0] <= 5 < max(lengths)
    assert len(list(generator.stream([PROMPTS[0]], GREEDY, Limits(12, [stop])))) == lengths[0]


def test_who_watches_a_text_ends_it() -> None:
    generator = Generator(inference_model(model_config()))
    told: list[list[int]] = []

    def watch(prompt: Sequence[int]) -> Callable[[int], bool]:
        assert list(prompt) in PROMPTS
        heard: list[int] = []
        told.append(heard)

        def end_after_three(token: int) -> bool:
            heard.append(token)
            return len(heard) == 3

        return end_after_three

    made = generator.generate(PROMPTS, GREEDY, Limits(12, watch=watch))
    assert told == tokens_of(made) and {text.end for text in made} == {"stop"} and {len(text) for text in told} == {3}


def test_the_model_s_maximum_ends_a_text() -> None:
    generator = Generator(inference_model(model_config(max_seq_len=16)))
    texts = generator.generate([[1] * 15, [2] * 4], GREEDY, Limits(100))
    assert [len(text.tokens) for text in texts] == [1, 12]


def test_ids_that_the_tokenizer_lacks_are_never_chosen() -> None:
    model = inference_model(model_config())
    texts = tokens_of(Generator(model, num_ids=7).generate([[1]] * 8, Sampling(temperature=50.0), Limits(20)))
    assert max(map(max, texts)) == 6
    assert max(map(max, tokens_of(Generator(model).generate([[1]] * 8, Sampling(temperature=50.0), Limits(20))))) > 6


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
