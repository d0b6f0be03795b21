"""How long a run is, and how its batch grows: from tokens, as papers say it, to samples and steps.

A run of `tokens` is so many steps as come nearest to it.  Small batches early in training save tokens, large ones late
save time, so the batch may grow at given numbers of tokens (Brown et al. 2020, §2.3; BLOOM, §3.2; OPT, §2.3):

    batch: {ramp: [[0, 16], [12e9, 1562]]}          # 16 sequences a step at first, 1,562 from 12 billion tokens on

Which batch a step has follows from how many samples have been consumed before it and from nothing else.  So samples
come in one order for every data-parallel size and after every resume, and the state of a ramp is a number that is in
every checkpoint anyway.  The learning rate of a ramped run follows its tokens, measured in batches of the final size.
"""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema, model_validator

from engine.config.fields import MOST, Section, Size

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_TOKENS = re.compile(r"([\d_]+(?:\.\d+)?(?:[eE]\+?\d+)?)\s*([KMBGT]?)(?:\s*tokens?)?", re.IGNORECASE)


@dataclass(frozen=True)
class Stage:
    """Batches of one size: `size` samples a step, from the first step that `first` samples have gone before."""

    first: int
    size: int


@dataclass(frozen=True)
class Ramp:
    """The sizes of a run's batches, in stages that begin at 0 and go on for ever; one stage: they are all alike."""

    stages: tuple[Stage, ...]

    def size(self, consumed: int) -> int:
        """Samples of the step before which `consumed` have been taken."""
        return next(stage.size for stage in reversed(self.stages) if stage.first <= consumed)

    def samples(self, steps: int) -> int:
        """Samples that the first `steps` steps take."""
        consumed = 0
        for size, most in self._lengths():
            here = steps if most is None else min(steps, most)
            consumed, steps = consumed + here * size, steps - here
        return consumed

    def steps(self, samples: float) -> int:
        """Steps that come nearest to `samples` samples, at least one."""
        steps, left = 0, samples
        for size, most in self._lengths():
            if most is None or most * size > left:
                return max(1, steps + round(left / size))
            steps, left = steps + most, left - most * size
        raise AssertionError("the last stage has no end")

    def _lengths(self) -> list[tuple[int, int | None]]:
        """Each stage's size and number of steps; a step that crosses the next stage's beginning is still its own."""
        found: list[tuple[int, int | None]] = []
        begin = 0
        for stage, following in pairwise(self.stages):
            steps = max(0, -(-(following.first - begin) // stage.size))
            found.append((stage.size, steps))
            begin += steps * stage.size
        return [*found, (self.stages[-1].size, None)]


def read_tokens(value: object) -> int:
    """A number of tokens: 1400000000000, 1.4e12, `1.4T`, `300B`, `500 M tokens`.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, str) and (match := _TOKENS.fullmatch(value.strip())):
        number = float(match[1].replace("_", "")) * UNITS[match[2].upper()]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number = value
    else:
        number = math.nan
    if not 0 <= number <= 10**18:
        raise ValueError(f"must be a number of tokens such as 1.4T, 300B or 5e9; it is {value!r:.60}")
    return round(number)


Tokens = Annotated[int, BeforeValidator(read_tokens), WithJsonSchema(
    {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string"}]})]      # 5e9, 5B, 1.4T


def read_warmup(value: object) -> int | str:
    """A number of steps; or a share of the run or a number of tokens, as written.

    Raises:
        ValueError: it is none of them.
    """
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST:
        return value
    if isinstance(value, str) and value.strip().endswith("%"):
        with suppress(ValueError):
            if 0 <= float(value.strip().removesuffix("%")) < 100:
                return value.strip()
    elif isinstance(value, str) and not value.strip().isdigit():
        read_tokens(value)
        return value.strip()
    raise ValueError(f"must be a number of steps, a share such as 1%, or tokens such as 375M; it is {value!r:.60}")


Warmup = Annotated[int | str, PlainValidator(read_warmup), WithJsonSchema(
    {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string"}]})]


class BatchConfig(Section):
    """Sizes in sequences.  global = micro × data × microbatches.

    With a ramp, entries [TOKENS, SIZE], the batch is SIZE from so many tokens on, and `global` is the last of them.
    """

    micro: Size = 1
    ramp: tuple[tuple[Tokens, Size], ...] = ()
    global_: Size = Field(default_factory=lambda values: values["ramp"][-1][1] if values["ramp"] else values["micro"],
                          validation_alias="global", serialization_alias="global")

    @model_validator(mode="after")
    def _rises(self) -> BatchConfig:
        if not self.ramp:
            return self
        tokens, sizes = zip(*self.ramp, strict=True)
        if tokens[0] != 0 or any(one >= other for one, other in pairwise(tokens)):
            raise ValueError(f"ramp begins at 0 tokens and its tokens rise, but they are {', '.join(map(str, tokens))}")
        if sizes[-1] != self.global_:
            raise ValueError(f"ramp ends with batches of {sizes[-1]}, and batch.global is {self.global_}: make them "
                             "equal, or leave batch.global out")
        return self

    def sizes(self, seq_len: int) -> Ramp:
        """The sizes of a run's batches, for sequences of `seq_len` tokens."""
        entries = self.ramp or ((0, self.global_),)
        return Ramp(tuple(Stage(-(-tokens // seq_len), size) for tokens, size in entries))

    def steps(self, tokens: int, seq_len: int) -> int:
        """The steps that come nearest to `tokens` tokens."""
        return self.sizes(seq_len).steps(tokens / seq_len)
