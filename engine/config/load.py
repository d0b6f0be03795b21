"""Reading a configuration: YAML with `base:` inheritance, dotted overrides, presets, and errors that help.

Values come from four layers, later ones win: the model preset, the base files, the file, the command line.  Where the
vocabulary's size is in none of the last three, it is the preset's or the tokenizer's, whichever is larger.  While
merging, the origin of every key (`file:line` or `command line`) is kept, so that each problem says where to look.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from engine.config.fields import nearest
from engine.config.problems import explain, listed
from engine.config.schema import Config
from engine.config.vocabulary import tokenizer_vocab_size
from engine.config.yaml_values import MAX_DEPTH, KeyPath, Origins, parse_yaml, read_text
from engine.errors import ConfigError
from engine.instead import is_address
from engine.shipped import shipped

PRESETS = Path(__file__).parent / "presets"

MOST_BASES = 16

# Two ways to say one thing: the layer that says it last decides, whichever way the layers below it chose.
ALTERNATIVES: tuple[tuple[KeyPath, KeyPath], ...] = ((("steps",), ("tokens",)),
                                                     (("optim", "warmup_steps"), ("optim", "warmup")))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The resolved configuration of the file at `path`, with overrides such as `optim.lr=3e-4` on top.

    Args:
        path: a file, or the name of a configuration that comes with Octant (`config_names`).

    Raises:
        ConfigError: with every problem of the file and the overrides at once.
    """
    file = _found(path)
    if not file.is_file() and (instead := _instead(path)):
        raise ConfigError(f"cannot read the configuration {path}: {instead}")
    values, origins = _read_with_bases(file, ())
    for override in overrides:
        _merge(values, origins, *_parse_override(override))
    values = {key: {} if value is None and not _may_be_absent(key) else value for key, value in values.items()}
    if isinstance(model := values.get("model"), dict):
        preset = _preset(model, origins.get(("model", "preset"), str(path)))
        values["model"] = preset | _vocabulary(model, preset, values.get("data"))
        _merge(values["model"], {}, model, {})
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = explain(error, origins)
        raise ConfigError(f"{path}: {len(lines):,} problem{'s' * (len(lines) > 1)} in the configuration\n"
                          + listed(lines)) from None


def config_names() -> list[str]:
    """Names of the run configurations that come with Octant."""
    return sorted(file.stem for file in shipped("configs").glob("*.yaml"))


def _found(given: str | Path, beside: Path = Path()) -> Path:
    """The file that is meant: one of that name, or else the configuration of ours that a plain name stands for."""
    file = beside / given
    return file if file.is_file() or str(given) not in config_names() else shipped("configs") / f"{given}.yaml"


def preset_names() -> list[str]:
    """Names accepted by `model.preset`."""
    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


def preset_fields(name: str) -> dict[str, Any]:
    """The model section that a preset stands for."""
    return _read_yaml(PRESETS / f"{name}.yaml")[0]


def _may_be_absent(key: str) -> bool:
    """Whether a section that is null is none, rather than one of defaults."""
    field = Config.model_fields.get(key)
    return field is not None and field.default is None


def _instead(path: str | Path) -> str:
    """What to give in the place of a path that is no file; empty where nothing is known of it."""
    given, name = Path(path), Path(path).name.removesuffix(".yaml").removesuffix(".yml")
    if is_address(path):
        return "it is an address; download it and give the file"
    if "=" in name:
        return "no such file; the file or name of a configuration comes first, what is changed of it behind that"
    if given.is_dir():
        there = next((given / file for file in ("config.yaml", f"{name}.yaml") if (given / file).is_file()), None)
        return f"it is a folder; the configuration in it is {there}" if there else ""
    around = {name: name for name in config_names()} | {
        file.stem: str(file) for folder in (Path("configs"), given.parent) for file in sorted(folder.glob("*.yaml"))}
    if name in preset_names() and name not in around:
        return f"no such file. {name} is a preset: a file says `model: {{preset: {name}}}`"
    close = get_close_matches(name, around, n=1, cutoff=0.5)
    return f"no such file; did you mean {around[close[0]]}?" if close else ""


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
    below, below_origins = _read_with_bases(_found(base, path.parent), (*children, resolved))
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
    for pair in ALTERNATIVES:
        for given, other in (pair, pair[::-1]):
            if _at(over, given) is not None and _at(over, other) is None and isinstance(
                    section := _at(values, other[:-1]), dict):
                section.pop(other[-1], None)
    replaced = {*_put(values, over, ())}
    for stale in [key for key in origins if any(key[:depth] in replaced for depth in range(1, len(key) + 1))]:
        del origins[stale]
    origins.update(over_origins)


def _at(values: Any, path: KeyPath) -> Any:
    """What stands there; None where nothing does."""
    for key in path:
        values = values.get(key) if isinstance(values, dict) else None
    return values


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
    return preset_fields(name)


def _vocabulary(model: dict[str, Any], preset: dict[str, Any], data: Any) -> dict[str, int]:
    """`vocab_size` where the section does not give it: the preset's, or the tokenizer's where that is larger."""
    tokenizer = data.get("tokenizer") if isinstance(data, dict) else None
    if "vocab_size" in model or not isinstance(tokenizer, str):
        return {}
    size = tokenizer_vocab_size(tokenizer)
    return {} if size is None else {"vocab_size": max(size, preset.get("vocab_size", 0))}
