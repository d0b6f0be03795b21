"""An objective is a row: a run then trains, evaluates and logs it.  The objective is that of docs/extending.md."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
from pydantic import ValidationError

from engine.config import Config
from engine.config.objectives import OBJECTIVES, Row
from engine.config.rl import RL_OBJECTIVES
from engine.distributed.mesh import single_mesh
from engine.errors import ConfigError
from engine.model.objective import NEXT_TOKEN
from engine.train.corpora import Corpora
from engine.train.loop import Trainer
from engine.train.objectives import objective_of
from tests.kit.page import run_example
from tests.kit.runs import metrics, run_config


def with_objective(config: Config, name: str) -> Config:
    values = config.to_dict()
    return Config.model_validate(values | {"run": values["run"] | {"objective": name}})


def test_one_row_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("focal")
    vars(module).update(run_example("class Focal(Objective)"))
    monkeypatch.setitem(sys.modules, "focal", module)
    monkeypatch.setitem(OBJECTIVES, "focal", Row("focal:focal"))
    config = with_objective(run_config(tmp_path, "run", steps=6, eval={"every": 3}), "focal")
    trainer = Trainer.start(config, single_mesh(), Corpora.open(config), lambda: False)
    try:
        assert trainer.run()
    finally:
        trainer.close()
    rows = metrics(config)
    trained = [row for row in rows if "loss" in row]
    assert len(trained) == 6 and trained[-1]["loss"] < trained[0]["loss"]
    assert 4 < trained[0]["entropy"] < 4.575                                 # near ln 97, that of a uniform guess
    assert sum({"valid_loss", "valid_entropy"} <= row.keys() for row in rows) == 2


def test_without_the_row_nobody_knows_it(tmp_path: Path) -> None:
    config = run_config(tmp_path, "run")
    with pytest.raises(ValidationError, match="there is no objective 'focal'; known: pretrain, sft"):
        with_objective(config, "focal")
    with pytest.raises(ValidationError, match="ppo needs something that scores its texts"):
        with_objective(config, "ppo")


@pytest.mark.parametrize(("name", "keys"), [(name, {}) for name in OBJECTIVES if name not in RL_OBJECTIVES]
                         + [("reward", {"loss": "kwise"})])
def test_what_a_row_says_is_what_it_makes(tmp_path: Path, name: str, keys: dict[str, str]) -> None:
    """Memory is worked out, and data is opened, before the objective itself is there."""
    head = "score" if name == "reward" else "language_model"
    config = with_objective(run_config(tmp_path, "run", model={"head": head}, reward=keys), name)
    assert objective_of(config).rows_per_sample == config.rows_per_sample


def test_a_model_with_another_head_is_refused(tmp_path: Path) -> None:
    config = run_config(tmp_path, "run", model={"head": "score"})
    with pytest.raises(ConfigError, match=r"trains a model with model.head: language_model; it is score"):
        objective_of(config)
    assert objective_of(run_config(tmp_path, "other")) is NEXT_TOKEN
