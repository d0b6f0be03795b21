"""The schema for editors takes what loading takes and marks what loading refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine import cli
from engine.config import load_config
from engine.config.editor_schema import editor_schema
from engine.config.yaml_values import parse_yaml
from tests.config.test_fuzz import GOOD

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs").glob("*.yaml"))
jsonschema = pytest.importorskip("jsonschema", exc_type=ImportError)


def problems(values: Any) -> list[str]:
    checker = jsonschema.Draft202012Validator(editor_schema())
    return [error.message for error in checker.iter_errors(values)]


def test_it_is_a_schema_and_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    jsonschema.Draft202012Validator.check_schema(editor_schema())
    assert cli.run(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == editor_schema()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_files_are_right(path: Path) -> None:
    assert problems(parse_yaml(path.read_text(), path.name)[0]) == []
    assert problems(load_config(path).to_dict()) == []


def test_every_section_and_a_base_are_known() -> None:
    assert problems(parse_yaml(GOOD.decode(), "good")[0] | {"precision": {}}) == []


@pytest.mark.parametrize(("values", "message"), [
    ({"optim": {"lrr": 1}}, "'lrr' was unexpected"), ({"stesp": 1}, "'stesp' was unexpected"),
    ({"optim": {"lr": 1e26}}, "is greater than the maximum"), ({"parallel": {"schedule": "1f2b"}}, "is not one of"),
    ({"parallel": {"data": "atuo"}}, "is not valid under any"), ({"model": {"preset": "lama"}}, "is not one of"),
    ({"data": {"train": "data/tiny"}}, "is not of type 'array'"), ({"checkpoint": {"async_": True}}, "was unexpected"),
    ({"optim": {"decay": "cosinus"}}, "is not valid under any"), ({"batch": {"global": 0}}, "is less than the minimum"),
])
def test_mistakes_are_marked(values: dict[str, Any], message: str) -> None:
    assert any(message in problem for problem in problems(values)), problems(values)
