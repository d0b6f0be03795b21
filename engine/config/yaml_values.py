"""YAML text as plain values, each with the place it was written at; nothing in the text can do harm.

The scalars are YAML 1.2's: `3e-4` is a number, `off` and `no` are words, `010` is ten.  A document is numbers, words,
lists and mappings: tags are refused, because they make Python objects.  Anchors and merge keys (`<<: *anchor`) work,
but what they multiply counts: a few lines can stand for billions of values.  Depth, size and digits are bounded as
well, so that no file takes more than seconds, and each refusal says where.

`dump_yaml` writes what `parse_yaml` reads: a word that this module would take for a number is quoted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from engine.errors import ConfigError, printable
from engine.reading import read_bytes

MAX_BYTES = 1 << 20                                          # a configuration is some kilobytes
MAX_VALUES = 100_000
MAX_DEPTH = 32
MAX_DIGITS = 100

KeyPath = tuple[str | int, ...]
Origins = dict[KeyPath, str]

_PREFIX = "tag:yaml.org,2002:"
_NUMBER = "-+0123456789."
_SCALARS = (                                                 # tag, what matches, first characters, what it becomes
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^(?:[-+]?\d[\d_]*|0x[\da-fA-F_]+|0o[0-7_]+)$", list(_NUMBER)),
    ("float", r"^[-+]?(?:(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
     list(_NUMBER)),
    ("merge", r"^(?:<<)$", ["<"]),
)


class _Loader(yaml.SafeLoader):
    """PyYAML's scanner and composer, with our scalars and a limit on depth."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.place, self.depth = name, 0

    def where(self, mark: yaml.Mark) -> str:
        return f"{self.place}:{mark.line + 1}"

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuses tags, which make Python objects, and documents too deep to be meant."""
        event = self.peek_event()
        if (tag := getattr(event, "tag", None)) is not None and tag != "!":
            raise ConfigError(f"{self.where(event.start_mark)}: the tag {tag:.60} is not allowed in a configuration; "
                              "write the plain value")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ConfigError(f"{self.where(event.start_mark)}: nested more than {MAX_DEPTH} levels deep; is a bracket "
                              "not closed?")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_PREFIX + _tag, re.compile(_pattern, re.ASCII), _first)


class _Dumper(yaml.SafeDumper):
    """Quotes every word that YAML 1.1 or this module would read as something else."""


for _tag, _pattern, _first in _SCALARS:
    _Dumper.add_implicit_resolver(_PREFIX + _tag, re.compile(_pattern, re.ASCII), _first)


def dump_yaml(values: Any) -> str:
    """The values as YAML that `parse_yaml` reads back."""
    def written(allow_unicode: bool) -> str:
        return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120,
                         allow_unicode=allow_unicode)

    text = written(True)
    return text if printable(text) == text else written(False)     # PyYAML lets some control characters through


def read_text(path: Path) -> str:
    """The text of a configuration file.

    Raises:
        ConfigError: it is no readable file, a pipe or a device, too large, or not UTF-8.
    """
    try:
        return read_bytes(path, MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read the configuration {path}: byte {error.start} is not UTF-8 text") from None
    except ValueError as error:                              # also a NUL in the path
        raise ConfigError(f"cannot read the configuration {path}: {error}") from None
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None


def parse_yaml(text: str, name: str) -> tuple[Any, Origins]:
    """The one document in `text` as plain values, and `name:line` of every key.

    Raises:
        ConfigError: it is no YAML, or holds what a configuration may not hold; the message says where.
    """
    try:
        loader = _Loader(text, name)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{name}:{line}: the control character {chr(error.character)!r} is not allowed; "
                          "is it a text file?") from None
    try:
        node = loader.get_single_node()
        builder = _Builder(loader)
        return (None if node is None else builder.build(node, ())), builder.origins
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{name} is not valid YAML: {place}{error.problem or error.context or '':.200}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:         # PyYAML itself, on "\UFFFFFFFF"
        raise ConfigError(f"{name} is not valid YAML: {error}") from None
    finally:
        loader.dispose()


class _Builder:
    """From PyYAML's nodes to plain values; counts them, also those that aliases repeat."""

    def __init__(self, loader: _Loader) -> None:
        self.loader, self.origins, self.num_values = loader, Origins(), 0

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self._count(node, len(path))
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return self._scalar(node)
        values: dict[str, Any] = {}
        own: set[str] = set()
        for key_node, value_node, merged in self._pairs(node, len(path)):
            where = self.loader.where(key_node.start_mark)
            key = self._key(key_node)
            if key in own and not merged:
                raise ConfigError(f"{where}: the key `{key:.60}` is given twice")
            if merged and key in values:                     # what is written here wins, then what was merged first
                continue
            own |= set() if merged else {key}
            self.origins[(*path, key)] = where
            values[key] = self.build(value_node, (*path, key))
        return values

    def _pairs(self, node: yaml.MappingNode, depth: int) -> Iterator[tuple[yaml.Node, yaml.Node, bool]]:
        """Keys and values of a mapping: its own first, then those of what it merges (`<<`)."""
        merges: list[yaml.Node] = []
        for key, value in node.value:
            if key.tag == _PREFIX + "merge":
                merges += value.value if isinstance(value, yaml.SequenceNode) else [value]
            else:
                yield key, value, False
        for merged in merges:
            self._count(merged, depth + 1)
            if not isinstance(merged, yaml.MappingNode):
                raise ConfigError(f"{self.loader.where(merged.start_mark)}: `<<` merges mappings, and this is none")
            for key, value, _ in self._pairs(merged, depth + 1):
                self._count(key, depth)
                yield key, value, True

    def _count(self, node: yaml.Node, depth: int) -> None:
        self.num_values += 1
        if depth > MAX_DEPTH or self.num_values > MAX_VALUES:
            bound = f"{MAX_DEPTH} levels" if depth > MAX_DEPTH else f"{MAX_VALUES:,} values"
            where = self.loader.where(node.start_mark)
            raise ConfigError(f"{where}: with its anchors the document has more than {bound}")

    def _key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise ConfigError(f"{self.loader.where(node.start_mark)}: a key is a word, not a list or a mapping")
        return str(node.value)

    def _scalar(self, node: yaml.Node) -> Any:
        text, kind = str(node.value), node.tag.removeprefix(_PREFIX)
        if kind in ("int", "float") and len(text) > MAX_DIGITS:
            raise ConfigError(f"{self.loader.where(node.start_mark)}: a number of {len(text):,} digits, {text[:20]}…")
        plain = text.replace("_", "")
        if kind == "int":
            return int(plain, 16 if plain.startswith("0x") else 8 if plain.startswith("0o") else 10)
        if kind == "float":
            return float(re.sub(r"\.(?=[infaINFA]{3}$)", "", plain))
        if kind == "merge":
            return text
        return {"null": None, "bool": text.lower() == "true"}.get(kind, text)
