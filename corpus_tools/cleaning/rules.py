"""A rules file, read strictly: what to remove, and with which numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError

from corpus_tools.cleaning.interface import Interface
from corpus_tools.cleaning.masking import Mask
from corpus_tools.cleaning.rule import (
    Alphanumeric,
    Digits,
    FastText,
    Keywords,
    Length,
    LineLengths,
    Patterns,
    Perplexity,
    Phrases,
    Punctuation,
    RepeatedLines,
    RepeatedNgrams,
    Script,
    Share,
    Strict,
    Symbols,
    UpperCase,
    Words,
)
from engine.errors import ConfigError
from engine.reading import read_bytes, said

AnyRule = Annotated[
    Length | Words | Script | FastText | Punctuation | Symbols | Digits | UpperCase | RepeatedLines | RepeatedNgrams
    | Keywords | Phrases | Patterns | Interface | Alphanumeric | LineLengths | Perplexity,
    Field(discriminator="rule"),
]  # fmt: skip

DEFAULT_RULES = Path(__file__).with_name("rules.yaml")


class LineRules(Strict):
    """Rules for lines, and how many may fall before the document does."""

    max_dropped_share: Share = 0.5
    rules: tuple[AnyRule, ...] = ()


class Duplicates(Strict):
    """`exact` compares normalised texts, `near` is a Jaccard similarity or null."""

    exact: bool = True
    near: Share | None = 0.8
    shingle: Annotated[int, Field(ge=1)] = 5
    permutations: Annotated[int, Field(ge=32, multiple_of=32)] = 128


class Contamination(Strict):
    """Overlap with evaluation texts: `ngram` words in a row, or the whole of a text of at least `min_words`."""

    ngram: Annotated[int, Field(ge=2)] = 13
    min_words: Annotated[int, Field(ge=1)] = 8


class Rules(Strict):
    """The whole file; a section left out does nothing, except that duplicates are removed."""

    lines: LineRules = LineRules()
    documents: tuple[AnyRule, ...] = ()
    mask: tuple[Mask, ...] = ()
    duplicates: Duplicates = Duplicates()
    contamination: Contamination = Contamination()

MOST_BYTES = 1 << 22  # of a rules file


def load_rules(path: str | Path = DEFAULT_RULES) -> Rules:
    """Read a rules file.

    Raises:
        ConfigError: naming the place of everything that is wrong with it.
    """
    try:
        content = yaml.safe_load(read_bytes(Path(path), MOST_BYTES).decode())
    except OSError as error:
        raise ConfigError(f"cannot read rules {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {said(error)}") from error
    try:
        return Rules.model_validate(content or {})
    except ValidationError as error:
        places = (".".join(map(str, item["loc"])) + ": " + item["msg"] for item in error.errors())
        raise ConfigError(f"{path}: " + "; ".join(places)) from error
