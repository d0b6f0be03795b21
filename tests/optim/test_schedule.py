"""Learning-rate shapes: their formulas, against another implementation, what they refuse, and one more by one entry."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from engine.config import Config, OptimConfig
from engine.config.decay import DECAYS
from engine.optim.schedule import learning_rate
from tests.kit.layouts import TINY

ROOT = Path(__file__).resolve().parents[2]
STEPS, WARMUP = 200, 20


def optim(decay: object, **keys: Any) -> OptimConfig:
    return OptimConfig.model_validate({"lr": 0.5, "warmup_steps": WARMUP, "decay": decay} | keys)


def whole(decay: object, steps: int = 10, **keys: Any) -> Config:
    return Config.model_validate({**TINY, "steps": steps, "optim": {"warmup_steps": 2, "decay": decay} | keys})


def transformers_schedule(name: str, **arguments: Any) -> Callable[[int], float]:
    """The multiplier of a schedule of `transformers`, by step."""
    optimization = pytest.importorskip("transformers.optimization")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    multiplier: Callable[[int], float] = getattr(optimization, f"get_{name}")(optimizer, **arguments).lr_lambdas[0]
    return multiplier


@pytest.mark.parametrize(("decay", "min_lr", "name", "arguments"), [
    ("cosine", 0.0, "cosine_schedule_with_warmup", {"num_training_steps": STEPS}),
    ("cosine", 0.05, "cosine_with_min_lr_schedule_with_warmup", {"num_training_steps": STEPS, "min_lr_rate": 0.1}),
    ("linear", 0.0, "linear_schedule_with_warmup", {"num_training_steps": STEPS}),
    ("linear_to_zero", 0.0, "linear_schedule_with_warmup", {"num_training_steps": STEPS}),
    ("constant", 0.0, "constant_schedule_with_warmup", {}),
    ("inverse_sqrt", 0.0, "inverse_sqrt_schedule", {"timescale": WARMUP}),
    ({"shape": "wsd", "decay_steps": 50}, 0.05, "wsd_schedule",
     {"num_decay_steps": 50, "num_training_steps": STEPS, "decay_type": "linear", "min_lr_ratio": 0.1}),
    ({"shape": "wsd", "decay_steps": 50, "form": "sqrt"}, 0.0, "wsd_schedule",
     {"num_decay_steps": 50, "num_training_steps": STEPS, "decay_type": "1-sqrt"}),
])
def test_equals_transformers(decay: object, min_lr: float, name: str, arguments: dict[str, Any]) -> None:
    multiplier = transformers_schedule(name, num_warmup_steps=WARMUP, **arguments)
    config = optim(decay, min_lr=min_lr)
    for step in range(1 if min_lr == 0 else WARMUP, STEPS + 1):      # theirs may warm up from min_lr
        assert learning_rate(step, STEPS, config) == pytest.approx(0.5 * multiplier(step), rel=1e-12, abs=1e-15), step


def test_a_tenth_of_the_steps_decays_unless_it_is_said() -> None:
    rates = [learning_rate(step, STEPS, optim("wsd")) for step in range(1, STEPS + 1)]
    assert rates[179] == 0.5 > rates[180] and rates[-1] == 0.05


def test_inverse_sqrt_does_not_fall_below_its_floor() -> None:
    assert learning_rate(STEPS, STEPS, optim("inverse_sqrt", min_lr=0.4)) == 0.4


@pytest.mark.parametrize("name", DECAYS)
def test_every_shape_begins_at_the_peak_and_never_rises(name: str) -> None:
    rates = [learning_rate(step, STEPS, optim(name)) for step in range(WARMUP, STEPS + 1)]
    assert rates[0] == 0.5 and rates == sorted(rates, reverse=True) and min(rates) >= optim(name).min_lr


@pytest.mark.parametrize("decay", ["wsd", {"shape": "wsd", "decay_steps": 3, "form": "sqrt"}, {"shape": "linear"}])
def test_what_is_written_is_read_again(decay: object) -> None:
    config = whole(decay)
    assert Config.model_validate(config.to_dict()) == config
    assert config.to_dict()["optim"]["decay"] == ("linear" if decay == {"shape": "linear"} else decay)


@pytest.mark.parametrize(("decay", "keys", "message"), [
    ("cosin", {}, "no such shape: 'cosin'; did you mean `cosine`?"),
    (7, {}, "must be a shape's name or {shape: NAME, …}; it is 7"),
    ({"decay_steps": 7}, {}, "must be a shape's name or {shape: NAME, …}"),
    ({"shape": "wsd", "decay_step": 7}, {}, "wsd has no key `decay_step`; did you mean `decay_steps`?"),
    ({"shape": "cosine", "decay_steps": 7}, {}, "cosine has no key `decay_steps`; it has none"),
    ({"shape": "wsd", "decay_steps": 0}, {}, "wsd, decay_steps: Input should be greater than or equal to 1 (it is 0)"),
    ({"shape": "wsd", "decay_steps": True}, {}, "must be a number, not true"),
    ({"shape": "wsd", "decay_steps": 9}, {}, "optim.warmup_steps(2) + the decay's 9 steps > steps(10)"),
    ("inverse_sqrt", {"warmup_steps": 0}, "set optim.warmup_steps to 1 or more"),
    ("linear_to_zero", {"min_lr": 1e-6}, "ends at 0, optim.min_lr is 1e-06: leave it out, or use `linear`"),
])
def test_what_cannot_work_is_refused(decay: object, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        whole(decay, **keys)
    assert message in str(caught.value)


def test_one_entry_adds_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of docs/extending.md: a key, a formula, a refusal, a floor; without the entry the name is unknown again."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```python\n(.*?class Power.*?)```", page.split("## A learning-rate shape")[1], re.DOTALL)
    module = types.ModuleType("power")
    monkeypatch.setitem(sys.modules, "power", module)
    exec(example, module.__dict__)
    with monkeypatch.context() as patch:
        patch.setitem(DECAYS, "power", module.Power)
        config = whole({"shape": "power", "exponent": 3})
        assert learning_rate(5, config.steps, config.optim) == config.optim.lr / 8
        assert config.optim.min_lr == 0
        assert config.to_dict()["optim"]["decay"] == {"shape": "power", "exponent": 3.0}
        assert str(config.optim.decay) == "power, exponent 3.0"
        assert "power" in json.dumps(Config.model_json_schema())
        with pytest.raises(ValidationError, match="must be positive: the rate would rise"):
            whole({"shape": "power", "exponent": 0})
    with pytest.raises(ValidationError, match="no such shape: 'power'"):
        whole("power")
    assert "power" not in json.dumps(Config.model_json_schema())


def test_the_square_root_rule_makes_the_whole_curve_smaller() -> None:
    """Two million labels in 350 steps, from a model that was pretrained in batches of four million tokens."""
    rule = {"labels": 2e6 / 350, "pretraining": 4e6}
    plain = OptimConfig(lr=5e-5, min_lr=5e-6, warmup_steps=10, decay="cosine")
    scaled = OptimConfig(lr=5e-5, min_lr=5e-6, warmup_steps=10, decay="cosine", square_root=rule)
    assert learning_rate(10, 350, scaled) == pytest.approx(1.88982e-6, rel=1e-5)
    for step in (1, 5, 10, 100, 350):
        assert learning_rate(step, 350, scaled) == pytest.approx(learning_rate(step, 350, plain) * 0.0377964, rel=1e-5)
