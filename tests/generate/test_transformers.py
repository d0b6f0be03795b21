"""The same weights in `transformers` continue prompts with the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.generate.beams import beam_search
from engine.generate.generator import Generator
from engine.generate.request import Limits, Sampling
from engine.model.parameters import spec_of
from tests.kit.hugging_face import build_twin, load_twin, twin_names
from tests.kit.models import PROMPTS, inference_model, model_config, whole_model

CASES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {"qkv_bias": True, "tie_embeddings": True}, "mistral": {"num_kv_heads": 2, "window": 6}}


def both(family: str) -> tuple[Generator, Any]:
    config = model_config(**CASES[family])
    twin = build_twin(config.model, family).eval()
    weights = {spec_of(p).name: p.detach() for p in whole_model(config).parameters()}
    load_twin(twin, twin_names(weights, config.model))
    return Generator(inference_model(config), rows=8), twin


def theirs(twin: Any, prompt: list[int], **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    text = twin.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, use_cache=True,
                         pad_token_id=0, **options)
    return list(text[0, len(prompt):].tolist())


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_a_penalty_for_repetition_is_that_of_transformers(penalty: float) -> None:
    generator, twin = both("llama")
    ours = generator.generate(PROMPTS, Sampling(temperature=0, repetition_penalty=penalty), Limits(20))
    plain = generator.generate(PROMPTS, Sampling(temperature=0), Limits(20))
    assert [text.tokens for text in ours] != [text.tokens for text in plain]
    for prompt, text in zip(PROMPTS, ours, strict=True):
        assert text.tokens == theirs(twin, prompt, repetition_penalty=penalty, eos_token_id=None)


@pytest.mark.parametrize(("beams", "penalty"), [(2, 1.0), (3, 1.0), (5, 1.0), (3, 1.2)])
def test_beams_are_those_of_transformers(beams: int, penalty: float) -> None:
    generator, twin = both("llama")
    sampling, stopped = Sampling(repetition_penalty=penalty), 0
    [free] = beam_search(generator, PROMPTS[:1], beams, sampling, Limits(20))
    for stops in ([], [free.tokens[3]], free.tokens[2:4]):
        ours = beam_search(generator, PROMPTS, beams, sampling, Limits(20, stops))
        stopped += sum(text.end == "eod" for text in ours)
        for prompt, text in zip(PROMPTS, ours, strict=True):
            assert text.tokens == theirs(twin, prompt, num_beams=beams, repetition_penalty=penalty,
                                         eos_token_id=stops or None)
    assert stopped


@pytest.mark.parametrize("family", CASES)
def test_greedy_text_is_that_of_transformers(family: str) -> None:
    generator, twin = both(family)
    stop = generator.generate(PROMPTS[:1], Sampling(temperature=0), Limits(20))[0].tokens[5]
    ours = generator.generate(PROMPTS, Sampling(temperature=0), Limits(20, [stop]))
    for prompt, text in zip(PROMPTS, ours, strict=True):
        assert text.tokens == theirs(twin, prompt, eos_token_id=stop)
