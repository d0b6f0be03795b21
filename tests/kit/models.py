"""Small models for generation, whose weights are a function of the configuration alone: the same in every layout."""

from __future__ import annotations

from typing import Any

import torch

from engine.config import Config
from engine.distributed.mesh import Mesh, single_mesh
from engine.model.parameters import initialise
from engine.model.transformer import Transformer
from engine.parallel.parallelize import ParallelModel, parallelize
from tests.kit.layouts import tiny_config

PROMPTS = [[5, 1, 4], [3, 14, 15, 9, 2, 6, 5, 3, 5], [11], [8, 9, 7, 9]]
LOUDER = 8.0                 # initial weights times this: predictions that differ clearly from token to token


def model_config(tensor: int = 1, pipeline: int = 1, **model: Any) -> Config:
    """A tiny model with grouped queries in a layout."""
    return tiny_config(model={"num_kv_heads": 4, "num_heads": 8, **model},
                       parallel={"tensor": tensor, "pipeline": pipeline, "zero": 0})


def fill(chunk: torch.nn.Module, seed: int) -> None:
    """Initial weights, made louder; biases too get values."""
    initialise(chunk, seed)
    with torch.no_grad():
        for name, parameter in chunk.named_parameters():
            if name.endswith("bias"):
                parameter.fill_(0.3)
            elif parameter.dim() > 1:
                parameter.mul_(LOUDER)


def inference_model(config: Config, mesh: Mesh | None = None) -> ParallelModel:
    """This rank's part, ready to generate."""
    model = parallelize(config, mesh or single_mesh(), training=False)
    for chunk in model.chunks.values():
        fill(chunk, config.run.seed)
    return model


def whole_model(config: Config) -> Transformer:
    """The same model, uncut and without any machinery."""
    model = Transformer(config.model)
    fill(model, config.run.seed)
    return model
