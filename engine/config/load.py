"""Reading a configuration: YAML with `base:` inheritance, dotted overrides, presets, and errors that help.

Values come from four layers, later ones win: the model preset, the base files, the file, the command line.  Where the
vocabulary's size is in none of the last three, it is the preset's or the tokenizer's, whichever is larger.  While
merging, the origin of every key (`file:line` or `command line`) is kept, so that each problem says where to look.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from engine.config.fields import nearest
from engine.config.schema import Config
from engine.config.vocabulary import tokenizer_vocab_size
from engine.config.yaml_values import MAX_DEPTH, KeyPath, Origins, parse_yaml, read_text
from engine.errors import ConfigError

PRESETS = Path(__file__).parent / "presets"

MOST_PROBLEMS = 20                                           # shown at once
MOST_BASES = 16


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The resolved configuration of the file at `path`, with overrides such as `optim.lr=3e-4` on top.

    Raises:
        ConfigError: with every problem of the file and the overrides at once.
    """
    values, origins = _read_with_bases(Path(path), ())
    for override in overrides:
        _merge(values, origins, *_parse_override(override))
    values = {key: {} if value is None else value for key, value in values.items()}
    if isinstance(model := values.get("model"), dict):
        preset = _preset(model, origins.get(("model", "preset"), str(path)))
        values["model"] = preset | _vocabulary(model, preset, values.get("data"))
        _merge(values["model"], {}, model, {})
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain(problem, origins) for problem in error.errors()
                 if problem["type"] != "default_factory_not_called"]        # follows from another problem
        more = [f"… and {len(lines) - MOST_PROBLEMS:,} more"] if len(lines) > MOST_PROBLEMS else []
        raise ConfigError(f"{path}: {len(lines):,} problem{'s' * (len(lines) > 1)} in the configuration\n"
                          + "\n".join(f"  - {line}" for line in lines[:MOST_PROBLEMS] + more)) from None


def preset_names() -> list[str]:
    """Names accepted by `model.preset`."""
    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


def _read_with_bases(path: Path, children: tuple[Path, ...]) -> tuple[dict[str, Any], Origins]:
    resolved = _resolve(path)
    if resolved in children or len(children) == MOST_BASES:
        chain = " -> ".join(str(file) for file in (*children, resolved))
        what = "goes round in a circle" if resolved in children else f"leads through more than {MOST_BASES} files"
        raise ConfigError(f"`base:` {what}: {chain}")
    values, origins = _read_yaml(path)
    base = values.pop("base", None)
    if base is None:
        return values, origins
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{origins['base',]}: `base:` must name one file, not {base!r}")
    below, below_origins = _read_with_bases(path.parent / base, (*children, resolved))
    _merge(below, below_origins, values, origins)
    return below, below_origins


def _resolve(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError) as error:     # a NUL, or links that lead round in a circle
        raise ConfigError(f"cannot read the configuration {path}: {error}") from None


def _read_yaml(path: Path) -> tuple[dict[str, Any], Origins]:
    values, origins = parse_yaml(read_text(path), str(path))
    if not isinstance(values, dict | None):
        raise ConfigError(f"{path}: a configuration is a mapping of sections, not {values!r:.60}")
    return values or {}, origins


def _merge(values: dict[str, Any], origins: Origins, over: dict[str, Any], over_origins: Origins) -> None:
    """Put `over` on top of `values`, key by key; lists and scalars are replaced whole, and so are their origins."""
    replaced = {*_put(values, over, ())}
    for stale in [key for key in origins if any(key[:depth] in replaced for depth in range(1, len(key) + 1))]:
        del origins[stale]
    origins.update(over_origins)


def _put(values: dict[str, Any], over: dict[str, Any], path: KeyPath) -> Iterator[KeyPath]:
    for key, value in over.items():
        below = values.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            yield from _put(below, value, (*path, key))
        else:
            values[key] = value
            yield (*path, key)


def _parse_override(override: str) -> tuple[dict[str, Any], Origins]:
    """`a.b=c` as the nested mapping {a: {b: c}}; the value is YAML."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys) or len(keys) > MAX_DEPTH:
        raise ConfigError(f"override {override!r:.200}: expected key=value, such as optim.lr=3e-4")
    value, _ = parse_yaml(text, f"override {override!r:.200}")
    origins: Origins = {}
    for depth in range(len(keys), 0, -1):
        origins[tuple(keys[:depth])] = "command line"
    for key in reversed(keys):
        value = {key: value}
    return value, origins


def _preset(model: dict[str, Any], origin: str) -> dict[str, Any]:
    """Takes `preset` out of the section and returns that preset's fields."""
    name = model.pop("preset", None)
    if name is None:
        return {}
    if name not in preset_names():
        raise ConfigError(f"{origin}: model.preset {name!r:.60} does not exist; "
                          + nearest(str(name)[:60], preset_names()))
    return _read_yaml(PRESETS / f"{name}.yaml")[0]


def _vocabulary(model: dict[str, Any], preset: dict[str, Any], data: Any) -> dict[str, int]:
    """`vocab_size` where the section does not give it: the preset's, or the tokenizer's where that is larger."""
    tokenizer = data.get("tokenizer") if isinstance(data, dict) else None
    if "vocab_size" in model or not isinstance(tokenizer, str):
        return {}
    size = tokenizer_vocab_size(tokenizer)
    return {} if size is None else {"vocab_size": max(size, preset.get("vocab_size", 0))}


def _explain(problem: Any, origins: Origins) -> str:
    """One line for one of pydantic's errors: the key, what is wrong, and where it was written."""
    path = _as_written(problem["loc"]) if problem["type"] != "extra_forbidden" else problem["loc"]
    kind, given = problem["type"], f"{problem['input']!r:.60}"
    if kind == "extra_forbidden":
        text = f"unknown key; {nearest(_short(path[-1]), list(_keys_at(Config, path[:-1])))}"
    elif kind == "missing":
        text = "is missing" + ("; give it, or a model.preset" if path[0] == "model" and len(path) <= 2 else "")
    elif kind == "model_type":
        text = f"must be a mapping, not {given}"
    elif kind == "value_error":
        text = f"{problem['msg'].removeprefix('Value error, '):.300}"
    else:
        text = problem["msg"].replace("Input should be", "must be") + f" (it is {given})"
        for bound in ("le", "ge"):                           # pydantic rounds them to a float's digits
            if bound in problem.get("ctx", {}):
                text = f"must be at {'most' if bound == 'le' else 'least'} {problem['ctx'][bound]:,} (it is {given})"
    where = next((origins[path[:depth]] for depth in range(len(path), 0, -1) if path[:depth] in origins), None)
    return ".".join(map(_short, path)) + ": " * bool(path) + text + (f"  [{where}]" if where else "")


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
