"""Every tensor × pipeline layout of up to four processes gives the tokens of one process, greedy and sampled."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from engine.config import Config
from engine.distributed.topology import Topology
from engine.generate.generator import Generator
from engine.generate.request import Limits, Sampling
from tests.kit.distributed import mesh_for, run_distributed
from tests.kit.models import PROMPTS, inference_model, model_config

MODELS: dict[str, dict[str, Any]] = {
    "odd vocabulary": {},
    "tied": {"tie_embeddings": True},
    "ranks without vocabulary": {"vocab_size": 20},          # 8, 8, 4 and 0 rows on four ranks
}
SAMPLINGS = (Sampling(temperature=0), Sampling(temperature=1.0, seed=1), Sampling(0.8, top_k=10, top_p=0.9, seed=2))
Texts = list[list[list[int]]]


def texts_of(config: Config) -> Texts:
    """Runs on one rank: a batch of unequal prompts per way of sampling."""
    generator = Generator(inference_model(config, mesh_for(Topology.of(config))))
    return [generator.generate(PROMPTS, sampling, Limits(10, stop_ids=[7])) for sampling in SAMPLINGS]


@cache
def one_process(model: str) -> Texts:
    generator = Generator(inference_model(model_config(**MODELS[model])))
    return [generator.generate(PROMPTS, sampling, Limits(10, stop_ids=[7])) for sampling in SAMPLINGS]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (1, 3), (4, 1), (2, 2), (1, 4)])
def test_same_tokens(tensor: int, pipeline: int, model: str) -> None:
    config = model_config(tensor, pipeline, **MODELS[model])
    for texts in run_distributed(texts_of, tensor * pipeline, config):
        assert texts == one_process(model)
