"""The prompts of a run: prompt i as a function of (files, seed, i) and nothing else.

    i ──▶ epoch, place ──permutation──▶ record ──template──▶ tokens

Every epoch has an order of its own, so that each prompt comes once in each; nothing is saved but the number of the next
one.  A record holds `prompt`, or `messages`, and whatever a reward function needs.  Of a prompt that would leave no
room for an answer the last tokens are kept (`data.too_long: cut`), or it is left out (`skip`), or refused (`stop`); how
many there were is counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from corpus_tools.conversations.files import Found, records
from corpus_tools.conversations.formats import prompt_of
from corpus_tools.inputs import expand_inputs
from corpus_tools.records import BadRecord
from engine.config import Config
from engine.data.chat.conversation import ASSISTANT, USER, Turn
from engine.data.chat.tokens import ChatEncoder
from engine.data.permutation import Permutation, derive_key
from engine.data.tokenizer import Tokenizer, load_tokenizer
from engine.errors import ConfigError, DataError
from engine.rl.rollouts import Prompt

CACHED_EPOCHS = 4


@dataclass(frozen=True)
class Prompts:
    """See `engine.rl.rollouts.PromptSource`.

    Attributes:
        known: the prompts, numbered by their place in the files.
        num_cut, num_left_out: of those that were too long.
        num_bad: records that could not be used.
    """

    known: tuple[Prompt, ...]
    tokenizer: Tokenizer
    end_ids: frozenset[int]
    seed: int
    content: str
    num_cut: int = 0
    num_left_out: int = 0
    num_bad: int = 0
    order: Any = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", lru_cache(CACHED_EPOCHS)(
            lambda epoch: Permutation(len(self.known), derive_key(self.seed, 0, epoch))))

    @staticmethod
    def open(config: Config) -> Prompts:
        """Reads all files that `data.train` names.

        Raises:
            DataError: a file or record cannot be used, or no prompt is left.
            ConfigError: no file or no tokenizer is named.
        """
        data = config.data
        if data.tokenizer is None or not data.train:
            raise ConfigError(f"run.objective {config.run.objective} needs prompts (data.train) and data.tokenizer")
        tokenizer = load_tokenizer(data.tokenizer)
        if tokenizer.vocab_size > config.model.vocab_size:
            raise DataError(f"tokenizer {data.tokenizer} has {tokenizer.vocab_size} ids, the model's vocabulary "
                            f"{config.model.vocab_size}: raise model.vocab_size or use another tokenizer")
        encoder = ChatEncoder(tokenizer, data.template)
        room = data.seq_len - config.rollout.max_new_tokens
        known: list[Prompt] = []
        num_cut = num_left_out = num_bad = 0
        for found in _records([source.path for source in data.train]):
            try:
                text, tokens = _encoded(found, encoder)
            except DataError:
                if data.on_error == "stop":
                    raise
                num_bad += 1
                continue
            if len(tokens) > room:
                if data.too_long == "stop":
                    raise DataError(f"a prompt has {len(tokens)} tokens; data.seq_len({data.seq_len}) − rollout."
                                    f"max_new_tokens({config.rollout.max_new_tokens}) leaves {room}: {text:.60}")
                num_cut, num_left_out = num_cut + (data.too_long == "cut"), num_left_out + (data.too_long == "skip")
                if data.too_long == "skip":
                    continue
                tokens = tokens[-room:]
            known.append(Prompt(len(known), tuple(tokens), text, found.value))
        if not known:
            files = ", ".join(source.path for source in data.train)
            raise DataError(f"{files}: not one prompt of at most {room} tokens")
        content = hashlib.sha256(json.dumps([prompt.tokens for prompt in known]).encode()).hexdigest()
        return Prompts(tuple(known), tokenizer, frozenset({tokenizer.eod_id, *_ends_of(encoder)}),
                       config.run.seed, content, num_cut, num_left_out, num_bad)

    def prompt(self, number: int) -> Prompt:
        epoch, place = divmod(number, len(self.known))
        chosen = self.known[self.order(epoch)(place)]
        return Prompt(number, chosen.tokens, chosen.text, chosen.record)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode([token for token in tokens if token not in self.end_ids])

    def fingerprint(self) -> dict[str, Any]:
        return {**self.tokenizer.info.fingerprint(), "sources": [{"prompts": self.content, "count": len(self.known)}],
                "seed": self.seed}


def _ends_of(encoder: ChatEncoder) -> list[int]:
    """What ends an answer in the template, where that is a special token."""
    text = encoder.encode((Turn(USER, "a"), Turn(ASSISTANT, "b")))
    last: list[int] = text.tokens[text.learned][-1:].tolist()
    return [token for token in last if token in encoder.tokenizer.specials.values()]


def _records(paths: Sequence[str]) -> Iterator[Found]:
    for path in paths:
        for file in expand_inputs([path]):
            yield from records(file)


def _encoded(found: Found, encoder: ChatEncoder) -> tuple[str, list[int]]:
    """The prompt of a record, as text and as tokens.

    Raises:
        DataError: there is none, or it cannot be encoded.
    """
    if isinstance(found.value, BadRecord):
        raise DataError(str(found.value))
    if not isinstance(found.value, Mapping):
        raise DataError(f"record {found.number} is no mapping with a prompt: {found.value!r:.60}")
    try:
        turns = prompt_of(dict(found.value))
    except ValueError as error:
        raise DataError(f"record {found.number}: {error}") from None
    if not turns:
        raise DataError(f"record {found.number} holds neither prompt nor messages: {', '.join(found.value):.60}")
    tokens: list[int] = encoder.prompt(tuple(turns)).tolist()
    if not tokens:
        raise DataError(f"record {found.number}: an empty prompt")
    return turns[-1].content, tokens
