"""What a step's texts are, between those who make them, those who score them and those who learn from them.

    prompt source  ──Prompt──▶  generation  ──Response──▶  Rollouts  ──▶  scores  ──▶  training, rollouts.jsonl

Rows are numbered over the whole step, in one order that no layout changes: the samples of a prompt are neighbours,

    row = place of the prompt in the step · samples + sample

and everything that is said of texts is a list by row.  Token ids, ends and scores are small and on every rank; numbers
per token that a model has computed are where `engine.rl.move` brings them.

*Who fills in what.*  The prompt source gives `Prompt`s by their number in the run's stream (`PromptSource`).
Generation (`Maker`) answers each sample of each with a `Response`, whose random numbers are named by (seed, step,
number of the prompt, sample, position) alone.  Scorers (`Scorer`) give a number to each row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from engine.rl.scores import Numbers


@dataclass(frozen=True)
class Prompt:
    """What texts go on from.

    Attributes:
        number: in the run's stream of prompts, from 0; with the data it says which prompt this is.
        tokens: token ids, at least one, at most data.seq_len − rollout.max_new_tokens.
        text: as people read it.
        record: the line of the prompt file, with whatever a reward function needs.
    """

    number: int
    tokens: tuple[int, ...]
    text: str
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Response:
    """What was made of a prompt.

    Attributes:
        tokens: new token ids; the last one is a stop id where the text ended by itself.
        ended: it did; else the limit cut it off.
        log_probs: log π(token) as generation computed it, at the run's temperature and over all ids of the tokenizer,
            before top-k and top-p; one per token, or none where the generator does not say.
    """

    tokens: tuple[int, ...]
    ended: bool
    log_probs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Rollouts:
    """The texts of one step, the same on every rank.

    Attributes:
        step: counted from 1.
        prompts: of the step.
        samples: texts of each.
        responses: by row.
        texts: the responses as people read them, without special tokens; by row.
        scores: what was said of each row before penalties, clipping and scaling; empty until it is known.
        parts: by the name of a function or model, what it said of each row.
    """

    step: int
    prompts: tuple[Prompt, ...]
    samples: int
    responses: tuple[Response, ...]
    texts: tuple[str, ...] = ()
    scores: Numbers = field(default_factory=lambda: np.empty(0))
    parts: Mapping[str, Numbers] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return len(self.prompts) * self.samples

    def prompt_of(self, row: int) -> Prompt:
        """What a row goes on from."""
        return self.prompts[row // self.samples]

    def sample_of(self, row: int) -> int:
        """Which of its prompt's texts a row is, from 0."""
        return row % self.samples

    @property
    def lengths(self) -> list[int]:
        """New tokens of each row."""
        return [len(response.tokens) for response in self.responses]

    @property
    def ended(self) -> list[bool]:
        """Which rows ended by themselves."""
        return [response.ended for response in self.responses]


class PromptSource(Protocol):
    """The prompts of a run as a function of their numbers: stateless, the same on every rank, without an end."""

    def prompt(self, number: int) -> Prompt:
        """Prompt `number` of the stream.

        Raises:
            DataError: a record cannot be used.
        """
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """A response as people and reward functions read it, without special tokens."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the prompts and their order, for checkpoints, as JSON."""
        ...


class Maker(Protocol):
    """Makes texts with the actor's weights as they were when it last took them over.

    Every rank of the job calls it alike; where the role `rollout` does not live, it has nothing to do.
    """

    def take_over(self) -> int:
        """Brings the weights that generate up to date with the actor's; the bytes that this rank received for it."""
        ...

    def make(self, step: int, prompts: Sequence[Prompt], samples: int) -> Mapping[int, Response]:
        """`samples` texts of each prompt, by row: those that this rank answers for.  Each row is on one rank.

        It talks to ranks of the role `rollout` only, so that others may do something else meanwhile.
        """
        ...


class Scorer(Protocol):
    """Says how good texts are; every rank of the job calls it alike and hears the same."""

    @property
    def name(self) -> str:
        """Under which its scores are logged; unique."""
        ...

    @property
    def weight(self) -> float:
        """Of its scores in the sum of all."""
        ...

    @property
    def complaints(self) -> tuple[str, ...]:
        """About texts of the last call without a score, for people."""
        ...

    def __call__(self, rollouts: Rollouts) -> Numbers:
        """A number for each row; NaN where there is none.

        Raises:
            RequestError: a reward function cannot be used, with its own error.
        """
        ...

    def close(self) -> None:
        """Ends what it has started."""
        ...
