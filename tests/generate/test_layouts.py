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


def texts_of(config: Config, rows: int = 64) -> Texts:
    """Runs on one rank: a batch of unequal prompts per way of sampling, several samples of each."""
    generator = Generator(inference_model(config, mesh_for(Topology.of(config))), rows=rows)
    return made_by(generator)


def made_by(generator: Generator) -> Texts:
    return [[text.tokens for text in generator.generate(PROMPTS, sampling, Limits(10, stop_ids=[7]), samples=1 + index)]
            for index, sampling in enumerate(SAMPLINGS)]


@cache
def one_process(model: str) -> Texts:
    return made_by(Generator(inference_model(model_config(**MODELS[model]))))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (1, 3), (4, 1), (2, 2), (1, 4)])
def test_same_tokens(tensor: int, pipeline: int, model: str) -> None:
    config = model_config(tensor, pipeline, **MODELS[model])
    for texts in run_distributed(texts_of, tensor * pipeline, config):
        assert texts == one_process(model)


@pytest.mark.parametrize(("tensor", "pipeline", "data"), [(1, 1, 2), (1, 1, 3), (2, 1, 2), (1, 2, 2)])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_copies_share_the_prompts_and_know_all_texts(tensor: int, pipeline: int, data: int, rows: int) -> None:
    config = model_config(tensor, pipeline).with_changes(parallel={"data": data})
    for texts in run_distributed(texts_of, tensor * pipeline * data, config, rows):
        assert texts == one_process("odd vocabulary")
