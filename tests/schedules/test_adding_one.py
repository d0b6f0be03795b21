"""A schedule is added by one row of the table: configuration, layout rules, command line and executor then know it.

The example is docs/extending.md's, taken from there.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import MappingProxyType

import pytest

from engine import cli
from engine.config import Config, resolve_layout
from engine.errors import ConfigError
from engine.schedules import table
from engine.schedules.lowering import lower
from engine.schedules.table import Recipe, build_schedule
from engine.schedules.validate import validate

ROOT = Path(__file__).resolve().parents[2]
MODEL = {"num_layers": 4, "hidden_size": 64, "num_heads": 4, "ffn_hidden_size": 96, "vocab_size": 301}


def documented() -> Recipe:
    """The row that docs/extending.md adds, made by the function that it shows."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    [function] = re.findall(r"^```python\n(.*?def one_at_a_time.*?)^```", page, re.MULTILINE | re.DOTALL)
    [row] = re.findall(r'^    "one-at-a-time": (.*),$', page, re.MULTILINE)
    names: dict[str, object] = {"Recipe": Recipe}
    exec(function, names)
    made = eval(row, names)
    assert isinstance(made, Recipe)
    return made


def config(schedule: str, **parallel: object) -> Config:
    return Config.model_validate({"model": MODEL, "steps": 1, "batch": {"global": 4},
                                  "parallel": {"pipeline": 2, "schedule": schedule, **parallel}})


def test_one_row_is_enough(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(table, "RECIPES", MappingProxyType({**table.RECIPES, "one-at-a-time": documented()}))
    for num_stages, num_microbatches in ((1, 1), (2, 4), (4, 3)):
        schedule = build_schedule("one-at-a-time", num_stages, num_microbatches)
        validate(schedule)
        validate(lower(schedule))
    resolved = resolve_layout(config("one-at-a-time", reproducible=True), 2)
    assert resolved.parallel.schedule == "one-at-a-time"
    with pytest.raises(ConfigError, match=r"the one-at-a-time schedule needs parallel.virtual_stages = 1 \(it is 2\)"):
        resolve_layout(config("one-at-a-time", virtual_stages=2), 2)
    assert "one-at-a-time" in Config.model_json_schema()["$defs"]["ParallelConfig"]["properties"]["schedule"]["enum"]
    assert cli.run(["schedule", "one-at-a-time", "--stages", "2", "--microbatches", "3"]) == 0
    assert "one-at-a-time: 2 stages, 3 microbatches — bubble 50.00%" in capsys.readouterr().out


def test_without_the_row_nobody_knows_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no schedule 'one-at-a-time'"):
        config("one-at-a-time")
    with pytest.raises(SystemExit):
        cli.run(["schedule", "one-at-a-time", "--stages", "2", "--microbatches", "3"])
    assert "unknown: 'one-at-a-time'" in capsys.readouterr().err
