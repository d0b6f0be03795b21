"""The configuration's section `data`: what is read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from engine.config.fields import NonNegative, Positive, Sample, Section, Size, Words

Share = Annotated[float, Field(ge=0, le=1)]
TokenName = NonNegative | Words                              # an id, or the text of a special token


class SourceConfig(Section):
    """One corpus: `path` is the prefix of its `.bin` and `.idx`; or a file of conversations."""

    path: Words
    kind: Literal["pretrain", "chat"] | None = None          # null: what run.objective learns from
    columns: dict[Words, Words] = Field(default_factory=dict)        # of conversations: a known key, the file's name
    weight: Positive = 1.0                                   # relative to the other sources
    epochs: Positive | None = None                           # instead of `weight`: in proportion to epochs × size
    max_epochs: Positive | None = None                       # leave the mixture after so many

    @model_validator(mode="after")
    def _weight_or_epochs(self) -> SourceConfig:
        if self.epochs is not None and self.weight != 1.0:
            raise ValueError(f"{self.path} has weight {self.weight} and epochs {self.epochs}; give one of them")
        return self


class DataConfig(Section):
    """What is read.  Paths are relative to the working directory."""

    tokenizer: Words | None = None                           # .model, .tiktoken, tokenizer.json or its folder; `bytes`
    seq_len: Size = 2048                                     # tokens per sequence
    train: tuple[SourceConfig, ...] = ()
    valid: tuple[SourceConfig, ...] = ()
    document_mask: bool = False                              # attention does not cross documents
    fim: Share = 0.0                                         # documents rearranged to fill in the middle
    fim_spm: Share = 0.5                                     # of those: suffix first
    fim_tokens: tuple[TokenName, TokenName, TokenName] | None = None         # null: as the tokenizer names them
    template: Words = "auto"                                 # of conversations; auto: the tokenizer's own
    pack: bool = True                                        # several conversations in a sequence, each for itself
    pad_to_multiple: Size = 8                                # rows end behind a microbatch's longest text, rounded up
    too_long: Literal["cut", "skip", "stop"] = "cut"         # a conversation longer than a sequence
    on_error: Literal["stop", "skip"] = "stop"               # a record that cannot be used; skip: count it
    cache: Words | None = None                               # where conversations in tokens are kept; null: in run.dir
    skip: tuple[tuple[Sample, Sample], ...] = ()             # ranges [a, b) of samples to leave out
