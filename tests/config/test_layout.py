"""A layout either divides evenly or is refused with the equation, before any process starts."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config import Config, resolve_layout
from engine.config.support import UNSUPPORTED
from engine.errors import ConfigError

MODEL = {"num_layers": 8, "hidden_size": 64, "num_heads": 8, "num_kv_heads": 4, "ffn_hidden_size": 96,
         "vocab_size": 301}


def make(parallel: dict[str, Any], batch: dict[str, int] | None = None, seq_len: int = 64,
         model: dict[str, int] | None = None) -> Config:
    return Config.model_validate({"model": MODEL | (model or {}), "steps": 10, "parallel": parallel,
                                  "batch": batch or {"global": 8}, "data": {"seq_len": seq_len}})


@pytest.mark.parametrize(("parallel", "world_size", "data"), [
    ({}, 1, 1), ({}, 8, 8), ({"tensor": 2, "pipeline": 2}, 8, 2), ({"tensor": 4, "data": 2}, 8, 2),
    ({"pipeline": 2, "schedule": "interleaved", "virtual_stages": 4}, 4, 2)])
def test_data_takes_what_is_left(parallel: dict[str, Any], world_size: int, data: int) -> None:
    config = resolve_layout(make(parallel), world_size)
    assert config.parallel.data == config.parallel.data_size == data
    assert config.parallel.world_size == world_size
    assert config.num_microbatches == 8 // data
    assert config == resolve_layout(config, world_size)


@pytest.mark.parametrize(("config", "world_size", "expected"), [
    (make({"tensor": 2, "pipeline": 4}), 12,
     "tensor(2) × context(1) × pipeline(4) × data(auto) does not make world size 12"),
    (make({"tensor": 2, "data": 3}), 4, "data(3) does not make world size 4: start 6 processes"),
    (make({"tensor": 8, "pipeline": 2}), 1, "one copy of the model takes 16 processes"),
    (make({}, {"micro": 2, "global": 9}), 1, "batch.global(9) is not batch.micro(2) × data(1)"),
    (make({}, {"global": 4}), 8, "make it a multiple of 8"),
    (make({"tensor": 3}), 3, "model.num_heads(8) is not divisible by parallel.tensor(3)"),
    (make({"tensor": 6}, model={"num_heads": 12, "head_dim": 8}), 6,
     "model.num_kv_heads(4) is not divisible by parallel.tensor(6), nor the other way round"),
    (make({"pipeline": 2, "schedule": "interleaved"}), 2, "virtual_stages ≥ 2 (it is 1)"),
    (make({"pipeline": 2, "virtual_stages": 2}), 2, "the 1f1b schedule needs parallel.virtual_stages = 1 (it is 2)"),
    (make({"pipeline": 2, "schedule": "zb-v"}), 2, "the zb-v schedule needs parallel.virtual_stages = 2 (it is 1)"),
    (make({"pipeline": 4, "schedule": "interleaved", "virtual_stages": 3}), 4,
     "model.num_layers(8) < pipeline(4) × virtual_stages(3) = 12"),
    (make({"tensor": 4}, seq_len=63), 4, "data.seq_len(63) is not divisible by tensor(4)"),
    (make({"pipeline": 4}, {"global": 100_000}), 4, "400,000 forward passes in one step, and 262,144 is the most"),
    (make({"context": 2}, seq_len=62), 2, "data.seq_len(62) is not divisible by 2 × context(2) = 4"),
])
def test_impossible_layouts_are_refused_with_the_equation(config: Config, world_size: int, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_layout(config, world_size)
    assert expected in str(caught.value)
    assert caught.value.exit_code == 2


def test_every_broken_equation_is_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_layout(make({"tensor": 3, "pipeline": 16}, seq_len=64), 5)
    assert str(caught.value).count("\n  - ") == 5


def test_a_layout_without_a_world_size_says_so() -> None:
    with pytest.raises(ConfigError, match="resolve_layout"):
        _ = make({}).parallel.data_size


def test_sequence_parallelism_off_needs_no_division() -> None:
    assert resolve_layout(make({"tensor": 4, "sequence": False}, seq_len=63), 4).parallel.data == 1


def test_what_is_not_there_yet_is_no_matter_of_the_layout() -> None:
    config = Config.model_validate({**make({}).to_dict(), "precision": {"fp8": "te"}})
    with pytest.raises(ConfigError, match=r"^this version cannot do that:\n  - FP8 by Transformer Engine is not avail"):
        resolve_layout(config, 1)
    with pytest.raises(ConfigError, match=r"cannot do that:\n  - FP8 .*\nthis layout cannot work:\n  - batch.global"):
        resolve_layout(config, 3)


def test_a_plain_config_asks_for_nothing_that_is_missing() -> None:
    assert not [what for asks, what, _ in UNSUPPORTED if asks(make({}))]
