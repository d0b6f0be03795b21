"""The kinds of rule a rules file may hold, and what each one looks for.

A rule answers one question about a text, a whole document or one line of it: should it go?  All its numbers come from
the file, so that what was removed from a corpus can be read off, repeated, and argued about.  Most kinds go back to C4
(Raffel et al. 2020), Gopher's MassiveText (Rae et al. 2021) and the data sections of LLaMA and Chinese-LLaMA.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import Counter
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from corpus_tools.cleaning.characters import SCRIPTS, Text
from engine.errors import RequestError
from engine.reading import said

_BETWEEN_PHRASES = re.compile(r"(?:[^\w\s&'’]|[\d_])+|\s\s+")

Share = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    """Frozen, and a key that isn't known is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Rule(Strict):
    """A named question; the name, by default the kind, is what the report counts under."""

    rule: str
    name: str = ""

    @property
    def label(self) -> str:
        return self.name or self.rule

    @abstractmethod
    def removes(self, text: Text) -> bool:
        """Should this text go?"""


class Length(Rule):
    """Shorter or longer than wanted."""

    rule: Literal["length"]
    min_characters: int = 0
    max_characters: int = 1 << 62

    def removes(self, text: Text) -> bool:
        return not self.min_characters <= len(text.text) <= self.max_characters


class Words(Rule):
    """Fewer or more words than wanted; in Chinese each character counts, so one number fits both."""

    rule: Literal["words"]
    min: int = 0
    max: int = 1 << 62

    def removes(self, text: Text) -> bool:
        return not self.min <= len(text.tokens) <= self.max


class Script(Rule):
    """Too few letters of the wanted scripts (`latin`, `han`, …), or no letters at all."""

    rule: Literal["script"]
    keep: tuple[str, ...]
    min_share: Share = 0.6

    @field_validator("keep")
    @classmethod
    def _known(cls, keep: tuple[str, ...]) -> tuple[str, ...]:
        for script in keep:
            if script not in SCRIPTS:
                raise ValueError(f"unknown script {script!r}; known: {', '.join(SCRIPTS)}")
        return keep

    def removes(self, text: Text) -> bool:
        return text.profile.script_share(self.keep) < self.min_share


class FastText(Rule):
    """The most probable language, by a fastText model, isn't among those wanted."""

    rule: Literal["fasttext"]
    model: str
    keep: tuple[str, ...]
    min_probability: Share = 0.65

    @cached_property
    def _model(self) -> Any:
        return load_fasttext(self.model)

    def removes(self, text: Text) -> bool:
        found = self._model.f.predict(text.text.replace("\n", " ") + "\n", 1, 0.0, "strict")
        probability, label = found[0] if found else (0.0, "")
        return label.removeprefix("__label__") not in self.keep or probability < self.min_probability


class Punctuation(Rule):
    """More punctuation than text has: tables, lists of links, ASCII art."""

    rule: Literal["punctuation"]
    max_share: Share

    def removes(self, text: Text) -> bool:
        found = text.profile
        return found.punctuation > self.max_share * found.visible


class Symbols(Rule):
    """More symbols (arrows, currency, mathematics, emoji) than text has."""

    rule: Literal["symbols"]
    max_share: Share

    def removes(self, text: Text) -> bool:
        found = text.profile
        return found.symbols > self.max_share * found.visible


class Digits(Rule):
    """Nearly nothing but numbers, with what stands between numbers."""

    rule: Literal["digits"]
    max_share: Share = 0.9

    def removes(self, text: Text) -> bool:
        found = text.profile
        without_words = found.visible - found.punctuation - found.symbols
        return found.digits > 0 and found.digits > self.max_share * without_words


class UpperCase(Rule):
    """Nearly all capitals."""

    rule: Literal["upper_case"]
    max_share: Share = 0.9
    min_letters: int = 10

    def removes(self, text: Text) -> bool:
        found = text.profile
        return found.letters >= self.min_letters and found.upper_case > self.max_share * found.letters


class Alphanumeric(Rule):
    """Too few letters and digits among all characters: data, generated code, drawings (The Stack; StarCoder, 2023)."""

    rule: Literal["alphanumeric"]
    min_share: Share = 0.25

    def removes(self, text: Text) -> bool:
        return sum(map(str.isalnum, text.text)) < self.min_share * len(text.text)


class LineLengths(Rule):
    """Lines longer than people write, in the mean or one of them: minified and generated code (Codex, StarCoder)."""

    rule: Literal["line_lengths"]
    max_mean: Annotated[int, Field(ge=1)] = 100
    max: Annotated[int, Field(ge=1)] = 1000

    def removes(self, text: Text) -> bool:
        lengths = [len(line) for line in text.text.split("\n")]
        return max(lengths) > self.max or sum(lengths) > self.max_mean * len(lengths)


class Perplexity(Rule):
    """Less likely than wanted by an n-gram model of good text (CCNet: Wenzek et al. 2020), per word.

    The text goes in as words in lower case without punctuation, each Han character by itself: train the model on such.
    """

    rule: Literal["perplexity"]
    model: str
    max: Annotated[float, Field(gt=1)]

    @cached_property
    def _model(self) -> Any:
        return load_kenlm(self.model)

    def removes(self, text: Text) -> bool:
        return bool(text.tokens) and self._model.perplexity(" ".join(text.tokens)) > self.max


class RepeatedLines(Rule):
    """Too large a share of the characters stands in lines that occurred before."""

    rule: Literal["repeated_lines"]
    max_share: Share

    def removes(self, text: Text) -> bool:
        lines = [line.strip() for line in text.text.split("\n") if line.strip()]
        times = Counter(lines)
        repeated = sum(len(line) * (count - 1) for line, count in times.items())
        return repeated > self.max_share * sum(map(len, lines))


class RepeatedNgrams(Rule):
    """Too large a share of the sequences of `n` words (or Han characters) occurred before."""

    rule: Literal["repeated_ngrams"]
    n: Annotated[int, Field(ge=1)] = 10
    max_share: Share

    def removes(self, text: Text) -> bool:
        words = text.tokens
        ngrams = len(words) - self.n + 1
        if ngrams < 2:
            return False
        distinct = len(set(zip(*(words[start:] for start in range(self.n)), strict=False)))
        return ngrams - distinct > self.max_share * ngrams


class Keywords(Rule):
    """At least `min_count` occurrences of words of a list; Latin words whole, in any case."""

    rule: Literal["keywords"]
    words: tuple[str, ...]
    min_count: Annotated[int, Field(ge=1)] = 1

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        def bounded(word: str) -> str:
            """The left bound stands behind the first letter, so that the search can leap from one to the next."""
            left = r"(?<!\w.)" if re.match(r"\w", word, re.ASCII) else ""
            right = r"(?!\w)" if re.search(r"\w\Z", word, re.ASCII) else ""
            return re.escape(word[0]) + left + re.escape(word[1:]) + right

        return re.compile("|".join(bounded(word.lower()) for word in self.words), re.ASCII)

    def removes(self, text: Text) -> bool:
        return sum(1 for _ in self._pattern.finditer(text.lower)) >= self.min_count


class Phrases(Rule):
    """Nothing but phrases of a list, in any case, with punctuation, numbers and symbols between them: menus, buttons.

    Phrases stand between such separators or two spaces; where one is not in the list, its words are tried alone.
    """

    rule: Literal["phrases"]
    phrases: tuple[str, ...]

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(" ".join(phrase.lower().split()) for phrase in self.phrases)

    def removes(self, text: Text) -> bool:
        parts = [" ".join(part.split()) for part in _BETWEEN_PHRASES.split(text.lower)]
        found = [part for part in parts if part]
        return bool(found) and all(part in self._known or self._known.issuperset(part.split()) for part in found)


class Patterns(Rule):
    """One of the regular expressions (Python's `re`) is found in the text in lower case.

    Those that begin with `^` are tried at the start only, the others wherever their first letter is.
    """

    rule: Literal["patterns"]
    patterns: tuple[str, ...]

    @field_validator("patterns")
    @classmethod
    def _usable(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            check_pattern(pattern)
            letters = re.sub(r"\\.|\(\?P?<\w+>", "", pattern)
            if letters != letters.lower():
                raise ValueError(f"{pattern!r} has capitals, but texts are compared in lower case")
        return patterns

    @cached_property
    def _compiled(self) -> tuple[re.Pattern[str] | None, re.Pattern[str] | None]:
        anchored = [pattern for pattern in self.patterns if pattern.startswith("^")]
        floating = [pattern for pattern in self.patterns if not pattern.startswith("^")]
        joined = ["|".join(f"(?:{pattern})" for pattern in part) for part in (anchored, floating)]
        return (re.compile(joined[0]) if anchored else None, re.compile(joined[1]) if floating else None)

    def removes(self, text: Text) -> bool:
        anchored, floating = self._compiled
        if anchored is not None and anchored.match(text.lower):
            return True
        return floating is not None and floating.search(text.lower) is not None


def check_pattern(pattern: str) -> str:
    """The pattern itself.

    Raises:
        ValueError: it is no regular expression.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    return pattern


def load_kenlm(path: str) -> Any:
    """A KenLM model, an `.arpa` or its binary form.

    Raises:
        RequestError: the package or the file is missing.
    """
    try:
        import kenlm  # optional package
    except ImportError as error:
        raise RequestError("the rule perplexity needs the package kenlm: pip install kenlm") from error
    try:
        return kenlm.Model(path)
    except OSError as error:
        raise RequestError(f"the rule perplexity cannot load its model {path}: {said(error)}") from error


def load_fasttext(path: str) -> Any:
    """A fastText model, such as lid.176.bin.

    Raises:
        RequestError: the package or the file is missing.
    """
    try:
        import fasttext  # optional package
    except ImportError as error:
        raise RequestError("the rule fasttext needs the package fasttext: pip install fasttext-wheel") from error
    try:
        return fasttext.load_model(path)
    except ValueError as error:
        raise RequestError(f"the rule fasttext cannot load its model: {error}") from error
