"""Reading a configuration: YAML with `base:` inheritance, dotted overrides, presets, and errors that help.

Values come from four layers, later ones win: the model preset, the base files, the file, the command line.  Where the
vocabulary's size is in none of the last three, it is the preset's or the tokenizer's, whichever is larger.  While
merging, the origin of every key (`file:line` or `command line`) is kept, so that each problem says where to look.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from engine.config.fields import nearest
from engine.config.schema import Config
from engine.config.vocabulary import tokenizer_vocab_size
from engine.errors import ConfigError

PRESETS = Path(__file__).parent / "presets"

KeyPath = tuple[str | int, ...]
Origins = dict[KeyPath, str]


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `3e-4` is a number, `off` and `no` are words."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag not in ("tag:yaml.org,2002:bool",
                                                                       "tag:yaml.org,2002:float",
                                                                       "tag:yaml.org,2002:timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"),
                              list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(
    r"^[-+]?(?:(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+0123456789."))


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
        raise ConfigError(f"{path}: {len(lines)} problem{'s' * (len(lines) > 1)} in the configuration\n"
                          + "\n".join(f"  - {line}" for line in lines)) from None


def preset_names() -> list[str]:
    """Names accepted by `model.preset`."""
    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


def _read_with_bases(path: Path, children: tuple[Path, ...]) -> tuple[dict[str, Any], Origins]:
    resolved = path.resolve()
    if resolved in children:
        chain = " -> ".join(str(file) for file in (*children, resolved))
        raise ConfigError(f"`base:` goes round in a circle: {chain}")
    values, origins = _read_yaml(path)
    base = values.pop("base", None)
    if base is None:
        return values, origins
    if not isinstance(base, str):
        raise ConfigError(f"{origins['base',]}: `base:` must name one file, not {base!r}")
    below, below_origins = _read_with_bases(path.parent / base, (*children, resolved))
    _merge(below, below_origins, values, origins)
    return below, below_origins


def _read_yaml(path: Path) -> tuple[dict[str, Any], Origins]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from None
    values, origins = _parse(text, str(path))
    if not isinstance(values, dict | None):
        raise ConfigError(f"{path}: a configuration is a mapping of sections, not {values!r:.60}")
    return values or {}, origins


def _parse(text: str, name: str) -> tuple[Any, Origins]:
    """The YAML document as plain values, and `name:line` of every key."""
    loader = _Loader(text)
    origins: Origins = {}
    try:
        node = loader.get_single_node()
        return (None if node is None else _build(loader, node, (), name, origins)), origins
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not valid YAML: {error}") from None
    finally:
        loader.dispose()


def _build(loader: _Loader, node: yaml.Node, path: KeyPath, name: str, origins: Origins) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, (*path, i), name, origins) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    loader.flatten_mapping(node)                             # `<<: *anchor`
    values: dict[str, Any] = {}
    own_start = node.start_mark.index
    for key_node, value_node in node.value:
        key = str(loader.construct_object(key_node))
        where = f"{name}:{key_node.start_mark.line + 1}"
        if key in values and key_node.start_mark.index >= own_start:
            raise ConfigError(f"{where}: the key `{key}` is given twice")
        origins[(*path, key)] = where
        values[key] = _build(loader, value_node, (*path, key), name, origins)
    return values


def _merge(values: dict[str, Any], origins: Origins, over: dict[str, Any], over_origins: Origins) -> None:
    """Put `over` on top of `values`, key by key; lists and scalars are replaced whole, and so are their origins."""
    replaced = [*_put(values, over, ())]
    for stale in [key for key in origins if any(key[:len(path)] == path for path in replaced)]:
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
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r}: expected key=value, such as optim.lr=3e-4")
    value, _ = _parse(text, f"override {override!r}")
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
        raise ConfigError(f"{origin}: model.preset {name!r} does not exist; {nearest(str(name), preset_names())}")
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
        text = f"unknown key; {nearest(str(path[-1]), list(_keys_at(Config, path[:-1])))}"
    elif kind == "missing":
        text = "is missing" + ("; give it, or a model.preset" if path[0] == "model" and len(path) <= 2 else "")
    elif kind == "model_type":
        text = f"must be a mapping, not {given}"
    elif kind == "value_error":
        text = problem["msg"].removeprefix("Value error, ")
    else:
        text = problem["msg"].replace("Input should be", "must be") + f" (it is {given})"
    where = next((origins[path[:depth]] for depth in range(len(path), 0, -1) if path[:depth] in origins), None)
    return ".".join(map(str, path)) + ": " * bool(path) + text + (f"  [{where}]" if where else "")


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
