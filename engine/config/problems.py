"""What pydantic found wrong with a configuration, in words: the key, what it should be, and where it was written.

An unknown key is most often one of ours under the name that another trainer gives it, or one that stands in the wrong
section; then the message has the right one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from engine.config.fields import nearest
from engine.config.schema import Config
from engine.config.synonyms import ours
from engine.config.yaml_values import KeyPath, Origins
from engine.reading import shown

MOST_PROBLEMS = 20                                           # shown at once
MOST_HINTS = 6                                               # for the keys of a section that is somebody else's
WORDS: Mapping[str, str] = MappingProxyType({                # what to write where a value has the wrong type; $: it
    "data.train": "is a list of sources: write [{path: $}]",
    "data.valid": "is a list of sources: write [{path: $}]",
    "checkpoint.resume": "is `auto` (the newest that verifies), `never`, or the path of a checkpoint",
    "checkpoint.load": "is the path of a checkpoint or of a run; null: begin with random weights",
    "log.wandb": "is the name of a project; null: no Weights & Biases",
    "model": "is a mapping: write {preset: $}",
})


def explain(error: ValidationError, origins: Origins) -> list[str]:
    """One line per problem."""
    return [_explain(problem, origins) for problem in error.errors()
            if problem["type"] != "default_factory_not_called"]          # follows from another problem


def listed(lines: Sequence[str]) -> str:
    """The first problems as a list."""
    more = [f"… and {len(lines) - MOST_PROBLEMS:,} more"] if len(lines) > MOST_PROBLEMS else []
    return "\n".join(f"  - {line}" for line in [*lines[:MOST_PROBLEMS], *more])


def _explain(problem: Any, origins: Origins) -> str:
    kind, given = problem["type"], shown(problem["input"])
    path: KeyPath = problem["loc"] if kind == "extra_forbidden" else _as_written(problem["loc"])
    if kind == "extra_forbidden":
        text = f"unknown key; {_right_key(path, problem['input'])}"
    elif kind == "missing":
        text = "is missing" + ("; give it, or a model.preset" if path[0] == "model" and len(path) <= 2 else "")
    elif kind == "value_error":
        text = f"{problem['msg'].removeprefix('Value error, '):.300}"
    elif kind.endswith("_type") and (words := WORDS.get(".".join(part for part in path if isinstance(part, str)))):
        value = problem["input"]
        text = words.replace("$", value if isinstance(value, str) and value else "…") + f" (it is {given})"
    elif kind == "model_type":
        text = f"must be a mapping, not {given}"
    else:
        text = problem["msg"].replace("Input should be", "must be") + f" (it is {given})"
        for name, words in (("le", "most"), ("ge", "least")):            # pydantic rounds them to a float's digits
            if (bound := problem.get("ctx", {}).get(name)) is not None:
                text = f"must be at {words} {f'{bound:,}' if isinstance(bound, int) else f'{bound:,g}'} (it is {given})"
    where = next((origins[path[:depth]] for depth in range(len(path), 0, -1) if path[:depth] in origins), None)
    return ".".join(map(_short, path)) + ": " * bool(path) + text + (f"  [{where}]" if where else "")


def _right_key(path: KeyPath, value: Any) -> str:
    """What to write in the place of a key that is not ours."""
    name, here = str(path[-1]), list(_keys_at(Config, path[:-1]))
    if row := ours(".".join(map(str, path))):
        return f"here it is `{row.key}`" + (f" ({row.note})" if row.note else "")
    if isinstance(value, dict) and not get_close_matches(name, here, n=1, cutoff=0.86):  # another trainer's section
        rows = {key: row for key in value if (row := ours(f"{name}.{key}"))}
        if rows:
            return "here " + ", ".join(f"its `{_short(key)}` is `{row.key}`"
                                       for key, row in [*rows.items()][:MOST_HINTS])
    if elsewhere := [key for key in dotted_keys() if key.rpartition(".")[2] == name]:
        return "it is " + " or ".join(f"`{key}`" for key in elsewhere[:MOST_HINTS])
    return nearest(_short(name), here)


def dotted_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every key, such as `optim.lr`, without those of the entries of lists."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.validation_alias or name}"
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel) and not prefix:
            yield from dotted_keys(inner, f"{key}.")
        else:
            yield key


def _short(part: str | int) -> str:
    """A key as it is shown: somebody's whole essay may have become one."""
    return f"{part:.40}" if isinstance(part, str) else str(part)


def _as_written(path: KeyPath) -> KeyPath:
    """The part of pydantic's path that is keys; behind it stands which branch of a union was tried."""
    model: type[BaseModel] | None = Config
    for depth, part in enumerate(path):
        if isinstance(part, int):
            continue
        if model is None or (field := _field(model, part)) is None:
            return path[:depth]
        model = next(_models_in(field.annotation), None)
    return path


def _keys_at(model: type[BaseModel], path: KeyPath) -> Iterator[str]:
    """YAML keys of the section at `path`."""
    for part in path:
        if isinstance(part, str) and (field := _field(model, part)) is not None:
            model = next(_models_in(field.annotation))
    yield from (str(field.validation_alias or name) for name, field in model.model_fields.items())
    if model.__name__ == "ModelConfig":
        yield "preset"
    if model is Config:
        yield "base"


def _field(model: type[BaseModel], key: str) -> FieldInfo | None:
    return next((field for name, field in model.model_fields.items() if key in (name, field.validation_alias)), None)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Models inside an annotation such as `tuple[Source, ...]` or `Scaling | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)
