"""How long a run is: tokens to steps as in the papers, growing batches, and the learning rate by tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from engine.config import Config, load_config
from engine.config.length import Ramp, Stage, read_tokens
from engine.errors import ConfigError
from engine.optim.schedule import LearningRates
from tests.kit.layouts import TINY


@pytest.mark.parametrize(("written", "tokens"), [
    ("1.4T", 1_400_000_000_000), ("300B", 300 * 10**9), ("500 M tokens", 500 * 10**6), ("1_000", 1000),
    (5e9, 5 * 10**9), ("2.5e9", 2_500_000_000), (0, 0), ("10k", 10_000), ("1g", 10**9)])
def test_tokens_are_read(written: object, tokens: int) -> None:
    assert read_tokens(written) == tokens


@pytest.mark.parametrize("written", ["", "many", "-1", -1, float("nan"), float("inf"), True, None, "1.4X", "1e30", [1]])
def test_what_is_no_number_of_tokens(written: object) -> None:
    with pytest.raises(ValueError, match=r"must be a number of tokens such as 1\.4T"):
        read_tokens(written)


@pytest.mark.parametrize(("name", "steps"), [
    ("llama-65b", 333_786), ("llama-33b", 333_786), ("llama-13b", 238_419), ("llama-7b", 238_419),
    ("tinyllama-1.1b", 1_430_511)])
def test_the_papers_lengths(name: str, steps: int) -> None:
    """LLaMA: 1.0T and 1.4T tokens in batches of 4M (Touvron et al. 2023, table 2); TinyLlama: 3T in batches of 2M."""
    config = load_config(name)
    assert config.steps == steps
    assert abs(config.num_samples * config.data.seq_len - (config.tokens or 0)) <= config.batch.global_ * 2048 / 2


def whole(**keys: Any) -> Config:
    values: dict[str, Any] = {**TINY}
    for key, value in keys.items():
        values[key] = values[key] | value if isinstance(value, dict) else value
        for given, other in (("warmup", "warmup_steps"), ("ramp", "global")):
            if isinstance(value, dict) and given in value and other not in value:
                del values[key][other]
    values = {key: value for key, value in values.items() if value is not None}
    return Config.model_validate(values)


def test_a_ramp_by_hand() -> None:
    """Sizes 2, 4, 8 from sample 0, 5, 12 on: 2 2 2 | 4 4 | 8 8 …  A step across a border has its own stage's size."""
    ramp = Ramp((Stage(0, 2), Stage(5, 4), Stage(12, 8)))
    consumed, sizes = 0, []
    for step in range(8):
        assert ramp.samples(step) == consumed
        if consumed:
            assert ramp.steps(consumed) == step
        sizes.append(ramp.size(consumed))
        consumed += sizes[-1]
    assert sizes == [2, 2, 2, 4, 4, 8, 8, 8]
    assert ramp.steps(14 + 3) == 5 and ramp.steps(14 + 5) == 6 and ramp.steps(0) == 1
    assert Ramp((Stage(0, 4), Stage(1, 8), Stage(2, 16))).samples(3) == 4 + 16 + 16, "a stage may be leapt over"


def test_a_ramp_of_one_size_is_none() -> None:
    """BLOOM's and others' are of different sizes; the arithmetic of an even run must not change by a bit."""
    plain = whole(steps=100)
    ramped = whole(steps=100, batch={"ramp": [[0, plain.batch.global_], [1000, plain.batch.global_]]})
    for step in range(1, 101):
        samples = step * plain.batch.global_
        assert LearningRates.of(plain)(step, samples) == LearningRates.of(ramped)(step, samples)
        assert ramped.ramp.size(samples) == plain.batch.global_


def test_the_rate_follows_the_tokens() -> None:
    """Half the tokens are half the way, however many steps they took."""
    ramped = whole(steps=None, tokens=16 * 800, data={"seq_len": 16}, batch={"ramp": [[0, 2], [16 * 400, 8]]},
                   optim={"warmup": "25%", "decay": "linear", "lr": 0.4, "min_lr": 0.0})
    assert (ramped.steps, ramped.num_samples, ramped.num_batches) == (200 + 50, 800, 100)
    rate = LearningRates.of(ramped)
    assert rate(50, 100) == pytest.approx(0.2)
    assert rate(100, 200) == pytest.approx(0.4)
    assert rate(200, 400) == pytest.approx(0.4 * 2 / 3)
    assert rate(250, 800) == 0.0


@pytest.mark.parametrize(("warmup", "batches"), [
    (3, 3), ("10%", 10), ("3200", None), ("3.2k", 50), ("3200 tokens", 50)])
def test_the_warm_up_in_three_units(warmup: object, batches: float | None) -> None:
    keys = {"steps": 100, "data": {"seq_len": 16}, "batch": {"global": 4}}
    if batches is None:
        with pytest.raises(ValidationError, match="a share such as 1%, or tokens such as 375M"):
            whole(**keys, optim={"warmup_steps": 0, "warmup": warmup})
    else:
        assert whole(**keys, optim={"warmup_steps": 0, "warmup": warmup}).rates.warmup_steps == batches


@pytest.mark.parametrize(("keys", "message"), [
    ({"steps": None}, "is missing; give it, or tokens"),
    ({"steps": 7, "tokens": "1M"}, "leave one of them out"),
    ({"batch": {"global": 4, "ramp": [[0, 2], [100, 8]]}}, "ramp ends with batches of 8, and batch.global is 4"),
    ({"batch": {"global": 8, "ramp": [[5, 2], [100, 8]]}}, "ramp begins at 0 tokens and its tokens rise"),
    ({"batch": {"global": 8, "ramp": [[0, 2], [0, 8]]}}, "ramp begins at 0 tokens and its tokens rise"),
    ({"optim": {"warmup_steps": 2, "warmup": 3}}, "leave one of them out"),
])
def test_what_contradicts_itself(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        whole(**keys)


def test_the_later_layer_says_which_way(tmp_path: Path) -> None:
    """A file's `steps` yields to `tokens` of the command line, and the other way round; what is dumped reads back."""
    base = whole(steps=10)
    (tmp_path / "base.yaml").write_text(base.dump())
    tokens = load_config(tmp_path / "base.yaml", ["tokens=64k"])
    assert tokens.steps == 64_000 // (base.batch.global_ * base.data.seq_len)
    (tmp_path / "tokens.yaml").write_text(tokens.dump())
    assert load_config(tmp_path / "tokens.yaml") == tokens
    assert load_config(tmp_path / "tokens.yaml", ["steps=12"]).steps == 12
    warm = load_config(tmp_path / "base.yaml", ["optim.warmup=20%"])
    assert (warm.optim.warmup_steps, warm.rates.warmup_steps) == (0, 2)
    with pytest.raises(ConfigError, match="leave one of them out"):
        load_config(tmp_path / "base.yaml", ["optim={warmup: 2, warmup_steps: 2}"])
