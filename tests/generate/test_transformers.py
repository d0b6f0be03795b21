"""The same weights in `transformers` continue prompts with the same tokens."""

from __future__ import annotations

import pytest
import torch

from engine.generate.generator import Generator
from engine.generate.request import Limits, Sampling
from engine.model.parameters import spec_of
from tests.kit.hugging_face import build_twin, load_twin, twin_names
from tests.kit.models import PROMPTS, inference_model, model_config, whole_model

CASES = {"llama": {}, "qwen2": {"qkv_bias": True, "tie_embeddings": True}, "mistral": {"num_kv_heads": 2}}


@pytest.mark.parametrize("family", CASES)
def test_greedy_text_is_that_of_transformers(family: str) -> None:
    config = model_config(**CASES[family])
    twin = build_twin(config.model, family).eval()
    weights = {spec_of(p).name: p.detach() for p in whole_model(config).parameters()}
    load_twin(twin, twin_names(weights, config.model))
    generator = Generator(inference_model(config))
    stop = generator.generate(PROMPTS[:1], Sampling(temperature=0), Limits(20))[0].tokens[5]
    ours = generator.generate(PROMPTS, Sampling(temperature=0), Limits(20, [stop]))
    for prompt, text in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = twin.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False,
                               use_cache=True, eos_token_id=stop, pad_token_id=0)
        assert text.tokens == theirs[0, len(prompt):].tolist()
