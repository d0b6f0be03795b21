"""The prompts of a run: prompt i as a function of (files, weights, seed, i) and nothing else.

    i ──skip──▶ stream index ──mixture──▶ file, position ──permutation──▶ record ──template──▶ tokens

Files are mixed by weight, and every epoch of every file has an order of its own, so that each prompt comes once in each
(`engine.data.training_data` has the same of windows).  The stream has no end, ranks do not occur in it, and nothing is
saved but the number of the next prompt.

A record holds `prompt` (a text or turns), `messages`, or what else conversation files have instead; the answer that it
may bring along is not part of the prompt, but stays in the record, where a reward function finds it.  A prompt that
leaves no room for `rollout.max_new_tokens` is never cut, for that would ask something else: it is left out where
`data.too_long` or `data.on_error` is `skip`, and refused otherwise.  What was left out is counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from corpus_tools.conversations.files import UNITS, Found, records
from corpus_tools.conversations.formats import prompt_of, require_columns
from corpus_tools.inputs import expand_inputs
from corpus_tools.records import BadRecord
from engine.config import Config, SourceConfig
from engine.data.chat.conversation import ASSISTANT, USER, Turn
from engine.data.chat.tokens import ChatEncoder
from engine.data.mixture import Mixture
from engine.data.permutation import Permutation, derive_key
from engine.data.skipping import merge_ranges, num_left, stream_index
from engine.data.sources import most_samples
from engine.data.tokenizer import Tokenizer, load_tokenizer
from engine.errors import ConfigError, DataError
from engine.reading import shown
from engine.rl.functions import keys_needed
from engine.rl.rollouts import Prompt

CACHED_EPOCHS = 64


@dataclass(frozen=True)
class PromptFile:
    """The prompts of one entry of `data.train`, numbered by their place.

    Attributes:
        sha256: of their tokens.
        num_too_long, num_unusable: records that were left out.
    """

    source: SourceConfig
    prompts: tuple[Prompt, ...]
    sha256: str
    num_too_long: int = 0
    num_unusable: int = 0

    def about(self) -> str:
        """What was read, in a line."""
        told = ((self.num_too_long, "too long and left out"), (self.num_unusable, "unusable and left out"))
        return f"{self.source.path}: {len(self.prompts):,} prompts" + "".join(
            f", {count:,} {what}" for count, what in told if count)

    def fingerprint(self) -> dict[str, Any]:
        """What identifies it, as JSON."""
        return {"name": Path(self.source.path).name, "num_prompts": len(self.prompts), "sha256": self.sha256,
                "weight": str(self.source.weight), "epochs": self.source.epochs}


class Prompts:
    """See `engine.rl.rollouts.PromptSource`."""

    def __init__(self, files: Sequence[PromptFile], tokenizer: Tokenizer, end_ids: frozenset[int], seed: int,
                 skip: Sequence[tuple[int, int]] = ()) -> None:
        self.files, self.tokenizer, self.end_ids = tuple(files), tokenizer, end_ids
        self._seed, self._skip = seed, merge_ranges(skip)
        self._mixture = Mixture([each.source.weight if each.source.epochs is None else
                                 each.source.epochs * len(each.prompts) for each in files],
                                [most_samples(each.source, len(each.prompts)) for each in files])
        self._order = lru_cache(CACHED_EPOCHS)(self._permutation)

    @staticmethod
    def open(config: Config) -> Prompts:
        """Reads all files that `data.train` names.

        Raises:
            DataError: a file or record cannot be used, no prompt is left, or there are fewer than the run takes.
            ConfigError: no file or no tokenizer is named.
            RequestError: `columns` names what no format has.
        """
        data = config.data
        if data.tokenizer is None or all(source.kind == "pretrain" for source in data.train):
            raise ConfigError(f"run.objective {config.run.objective} needs prompts (data.train) and data.tokenizer")
        tokenizer = load_tokenizer(data.tokenizer)
        if tokenizer.vocab_size > config.model.vocab_size:
            raise DataError(f"tokenizer {data.tokenizer} has {tokenizer.vocab_size} ids, the model's vocabulary "
                            f"{config.model.vocab_size}: raise model.vocab_size or use another tokenizer")
        reader = _Reader(config, ChatEncoder(tokenizer, data.template))
        files = [reader.read(source) for source in data.train if source.kind != "pretrain"]
        prompts = Prompts(files, tokenizer, frozenset({tokenizer.eod_id, *_ends_of(reader.encoder)}), config.run.seed,
                          data.skip)
        needed, there = config.steps * config.rollout.prompts, prompts.num_prompts
        if there is not None and there < needed:
            raise DataError(f"{config.steps:,} steps of {config.rollout.prompts:,} prompts take {needed:,}, but with "
                            f"max_epochs the files give {there:,}: lower steps, raise max_epochs or add prompts")
        return prompts

    @property
    def num_prompts(self) -> int | None:
        """Prompts until every file has reached its max_epochs; None where one has no limit."""
        total = self._mixture.num_samples
        return None if total is None else num_left(self._skip, total)

    def prompt(self, number: int) -> Prompt:
        file, position = self._mixture.locate(stream_index(self._skip, number))
        prompts = self.files[file].prompts
        epoch, place = divmod(position, len(prompts))
        return replace(prompts[self._order(file, epoch)(place)], number=number)

    def _permutation(self, file: int, epoch: int) -> Permutation:
        return Permutation(len(self.files[file].prompts), derive_key(self._seed, file, epoch))

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode([token for token in tokens if token not in self.end_ids])

    def fingerprint(self) -> dict[str, Any]:
        return {**self.tokenizer.info.fingerprint(), "sources": [file.fingerprint() for file in self.files],
                "seed": self._seed, "skip": [list(edges) for edges in self._skip]}


class _Reader:
    """How the prompts of a run are read."""

    def __init__(self, config: Config, encoder: ChatEncoder) -> None:
        self._data, self._limit, self.encoder = config.data, config.rollout.max_new_tokens, encoder
        self._keys = {key: source.function for source in config.roles.reward if source.function is not None
                      for key in keys_needed(source.function)}

    def read(self, source: SourceConfig) -> PromptFile:
        """The prompts at a path.

        Raises:
            DataError: a record cannot be used; none can.  RequestError: see `Prompts.open`.
        """
        require_columns(source.columns, source.path)
        prompts: list[Prompt] = []
        too_long = unusable = 0
        room = self._data.seq_len - self._limit
        for place, found in _records(source.path):
            try:
                prompt = self._prompt(len(prompts), found, source.columns)
            except (DataError, ValueError) as error:
                if self._data.on_error == "stop":
                    said = str(error) if isinstance(found.value, BadRecord) else f"{place}: {error}"
                    raise DataError(f"{said} (data.on_error: skip leaves such records out, and counts them)") from None
                unusable += 1
                continue
            if len(prompt.tokens) > room:
                if "skip" not in (self._data.too_long, self._data.on_error):
                    raise DataError(f"{place}: a prompt of {len(prompt.tokens):,} tokens; data.seq_len("
                                    f"{self._data.seq_len:,}) less rollout.max_new_tokens({self._limit:,}) has room "
                                    f"for {room:,}: raise data.seq_len, or leave such prompts out with data.too_long: "
                                    "skip")
                too_long += 1
                continue
            prompts.append(prompt)
        if not prompts:
            raise DataError(f"{source.path}: not one prompt of at most {room:,} tokens; {too_long:,} are longer, "
                            f"{unusable:,} records cannot be used")
        content = hashlib.sha256(json.dumps([prompt.tokens for prompt in prompts]).encode()).hexdigest()
        return PromptFile(source, tuple(prompts), content, too_long, unusable)

    def _prompt(self, number: int, found: Found, columns: Mapping[str, str]) -> Prompt:
        """
        Raises:
            DataError, ValueError: the record holds no prompt, or it cannot be encoded.
        """
        record = found.value
        if isinstance(record, BadRecord):
            raise DataError(str(record))
        if not isinstance(record, Mapping):
            raise ValueError(f"expected a JSON object, found {shown(record)}")
        for known, theirs in columns.items():
            if theirs not in record:
                raise ValueError(f"there is no {theirs!r} (columns: {known})")
        record = dict(record) | {known: record[theirs] for known, theirs in columns.items()}
        for key, function in self._keys.items():
            if record.get(key) is None:
                raise ValueError(f"there is no {key!r}, with which {function} compares")
        turns = prompt_of(record)
        if not turns:
            raise ValueError(f"it holds neither prompt nor messages; its keys are {', '.join(map(str, record)):.80}")
        tokens: list[int] = self.encoder.prompt(tuple(turns)).tolist()
        if not tokens:
            raise ValueError("the prompt is empty")
        return Prompt(number, tuple(tokens), turns[-1].content, record)


def _records(path: str) -> Iterator[tuple[str, Found]]:
    """The records at a path, each with its file and where in it."""
    for file in expand_inputs([path]):
        for found in records(file):
            yield f"{file.path}, {UNITS[file.format]} {found.number}", found


def _ends_of(encoder: ChatEncoder) -> list[int]:
    """What ends an answer in the template, where that is a special token."""
    text = encoder.encode((Turn(USER, "a"), Turn(ASSISTANT, "b")))
    last: list[int] = text.tokens[text.learned][-1:].tolist()
    return [token for token in last if token in encoder.tokenizer.specials.values()]
