"""Which tokenizer made these ids?  Everything that changes an id counts, and nothing else.

The hash of the tokenizer's file covers its vocabulary, merges, normalisation and added tokens.  It does not cover which
id ends a document: for a Hugging Face tokenizer that is named beside the file, in `tokenizer_config.json`, and people
change it (a chat model ends its turns with another token than its base model ends documents).  Ids prepared before and
after such a change must not meet in one corpus, one mixture or one run.  A chat template changes no id and does not
count.

A special id that one side doesn't know is no difference: earlier versions recorded no beginning of text, which no
corpus holds, and in checkpoints the hash alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TOKENIZER, END_OF_DOCUMENT = "tokenizer", "end_of_document"  # keys in the metadata of a checkpoint


@dataclass(frozen=True)
class TokenizerInfo:
    """What made the ids.  `kind`: bytes, sentencepiece or hf; `sha256`: of the tokenizer's file or definition."""

    kind: str
    name: str
    sha256: str
    vocab_size: int
    eod_id: int | None  # None: there is none, or it wasn't recorded
    bos_id: int | None = None

    def difference(self, other: TokenizerInfo) -> str | None:
        """Why another tokenizer's ids mean something else, in words; None where they mean the same."""
        if self.sha256 != other.sha256:
            return f"{self}, {other}"
        for key, mine, theirs in (("eos_token", self.eod_id, other.eod_id), ("bos_token", self.bos_id, other.bos_id)):
            if mine is not None and theirs is not None and mine != theirs:
                return f"both are {self}, but {key} in tokenizer_config.json is {mine} in one and {theirs} in the other"
        return None

    def __str__(self) -> str:
        return f"{self.name} (sha256 {self.sha256[:12]}…)"

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint records of the tokenizer it was trained with."""
        return {TOKENIZER: self.sha256, END_OF_DOCUMENT: self.eod_id}


def recorded_tokenizer(fingerprint: Mapping[str, Any]) -> TokenizerInfo | None:
    """The tokenizer that a checkpoint records, as far as it does."""
    if fingerprint.get(TOKENIZER) is None:
        return None
    return TokenizerInfo("", "the recorded one", str(fingerprint[TOKENIZER]), 0, fingerprint.get(END_OF_DOCUMENT))
