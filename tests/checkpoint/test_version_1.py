"""A checkpoint of the first format, made by the version that wrote it: tensor 2 × data 2, ZeRO 1."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from engine.checkpoint.read import CheckpointReader
from engine.checkpoint.resume import open_checkpoint
from engine.config import Config, resolve_layout
from engine.distributed.mesh import Job
from engine.train.role import Role, RoleState
from engine.train.state import TrainState
from tests.kit.distributed import job, run_distributed
from tests.kit.layouts import assemble
from tests.kit.runs import state_shards

FOLDER = Path(__file__).parent / "version-1"
DIGESTS: dict[str, str] = json.loads((FOLDER / "tensors.json").read_text())


def digest(values: torch.Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()


def test_every_tensor_is_read_bit_for_bit() -> None:
    reader = open_checkpoint(FOLDER)
    assert json.loads((reader.path / "manifest.json").read_text())["version"] == 1
    assert {key: digest(reader.read(key)) for key in reader.keys()} == DIGESTS


def test_what_holds_it_is_verified() -> None:
    assert CheckpointReader(FOLDER / "step-00000002").verify() == []


def load_here(parallel: dict[str, int]) -> object:
    """On one rank: what it holds after going on from it."""
    saved = CheckpointReader(FOLDER / "step-00000002").metadata["config"]
    values = {section: saved[section] for section in ("model", "precision", "data", "batch", "steps", "optim")}
    values["parallel"] = {"data": 1} | parallel
    config = Config.model_validate(values)
    config = resolve_layout(config, config.parallel.world_size)
    here = job() if config.parallel.world_size > 1 else Job("cpu")
    state = TrainState((RoleState.build(Role.of(config), config, here),))
    state.load(open_checkpoint(FOLDER, group=here.world.group))
    assert (state.step, state.consumed_samples, state.optimizer.num_steps()) == (2, 8, 2)
    return state_shards(state)


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}, {"data": 2, "zero": 3}, {"pipeline": 2}], ids=str)
def test_a_run_goes_on_from_it_in_any_layout(parallel: dict[str, int]) -> None:
    size = 2 if parallel else 1
    shards = run_distributed(load_here, size, parallel) if parallel else [load_here(parallel)]
    assert {key: digest(values) for key, values in assemble(shards).items()} == DIGESTS   # type: ignore[arg-type]
