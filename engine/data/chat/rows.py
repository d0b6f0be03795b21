"""Conversations as a source of training samples: rows of `seq_len`, several conversations in one or one in each.

A conversation that is longer than a row is cut at its end (`data.too_long: cut`), left out (`skip`) or refused
(`stop`).  One of which nothing to learn would be left, because its prompt is as long as a row, is never cut: it is left
out where `data.on_error` is `skip`, and refused otherwise.  What was cut and left out is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from engine.data.chat.corpus import ChatCorpus
from engine.data.mixture import exact
from engine.data.packing import laid_out, pack
from engine.data.sample import Sample
from engine.data.sources import Source, SourceLike, most_samples
from engine.data.tokenizer_identity import TokenizerInfo
from engine.errors import DataError

TooLong = Literal["cut", "skip", "stop"]
OnError = Literal["stop", "skip"]


@dataclass(frozen=True)
class Fit:
    """How conversations go into rows.

    Attributes:
        seq_len: inputs of a row; it has room for one token more.
        pad_id: fills it up; no label ever.
        packed: several conversations in a row, each for itself.
    """

    seq_len: int
    pad_id: int
    packed: bool = True
    too_long: TooLong = "cut"
    on_error: OnError = "stop"

    @property
    def room(self) -> int:
        return self.seq_len + 1


@dataclass(frozen=True)
class ConversationSource(Source):
    """Rows of conversations.

    Attributes:
        rows: the numbers of the conversations in each.
        num_cut, num_left_out: conversations that were too long.
    """

    corpus: ChatCorpus
    rows: Sequence[Sequence[int]]
    fit: Fit
    vocab_size: int
    num_cut: int
    num_left_out: int

    @staticmethod
    def open(prefix: str, source: SourceLike, fit: Fit, vocab_size: int) -> ConversationSource:
        """
        Args:
            prefix: where the conversations of `source` lie in tokens.

        Raises:
            DataError: they are missing or damaged; one of them, or each, does not fit.
        """
        corpus = ChatCorpus(prefix)
        lengths, num_cut, num_left_out = _lengths(corpus, fit)
        rows = pack(lengths, fit.room) if fit.packed else [[number] for number in np.flatnonzero(lengths).tolist()]
        if not rows:
            raise DataError(f"{source.path}: none of its {len(corpus):,} conversations fits in data.seq_len "
                            f"({fit.seq_len})")
        return ConversationSource(Path(source.path).name, source.path, len(rows), exact(source.weight),
                                  most_samples(source, len(rows)), corpus, rows, fit, vocab_size, num_cut, num_left_out)

    @property
    def document_mask(self) -> bool:
        return self.fit.packed

    @property
    def num_tokens(self) -> int:
        return self.corpus.num_tokens

    @property
    def made_by(self) -> TokenizerInfo:
        return self.corpus.sidecar.tokenizer

    @cached_property
    def padding(self) -> float:
        """The share of all rows that is padding."""
        used = sum(int(np.minimum(self.corpus.lengths[row], self.fit.room).sum()) for row in self.rows)
        return 1 - used / (len(self.rows) * self.fit.room)

    def lengths(self, window: int) -> tuple[int, ...]:
        return (int(np.minimum(self.corpus.lengths[self.rows[window]], self.fit.room).sum()),)

    def window(self, window: int, number: int) -> Sample:
        texts = [self._text(conversation) for conversation in self.rows[window]]
        tokens, mask, ids = laid_out(texts, self.fit.seq_len, self.fit.pad_id)
        used = min(sum(len(own) for own, _ in texts), self.fit.seq_len)
        return Sample(tokens, mask, ids if self.fit.packed else None, number, window, self.tags, used)

    def _text(self, conversation: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        [text] = self.corpus.texts(conversation)
        require_in_vocabulary(text.tokens, self.vocab_size, self.corpus.place(conversation))
        return text.tokens[: self.fit.room], text.learned[: self.fit.room]

    def fingerprint(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "num_tokens": self.num_tokens,
            "num_documents": len(self.corpus),
            "sha256": self.corpus.sidecar.files[".bin"].sha256,
            "mask_sha256": self.corpus.sidecar.files[".mask.bin"].sha256,
            "weight": str(self.weight),
            "max_samples": self.max_samples,
            "packed": self.fit.packed,
            "too_long": self.fit.too_long,
            "num_windows": self.num_windows,
        }

    def close(self) -> None:
        self.corpus.close()


def require_in_vocabulary(tokens: npt.NDArray[np.int64], vocab_size: int, place: str) -> None:
    """
    Raises:
        DataError: an id is none of the model's.
    """
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise DataError(f"{place}: ids from {tokens.min()} to {tokens.max()}, but the model's vocabulary is "
                        f"{vocab_size} (0 to {vocab_size - 1}): raise model.vocab_size, or use its own tokenizer")


def _lengths(corpus: ChatCorpus, fit: Fit) -> tuple[npt.NDArray[np.int64], int, int]:
    """Tokens that each conversation has in a row, 0 where it is left out; how many were cut, and left out."""
    lengths = np.minimum(corpus.lengths, fit.room)
    num_cut = num_left_out = 0
    for number in np.flatnonzero(corpus.lengths > fit.room).tolist():
        [text] = corpus.texts(number)
        has_labels = bool(text.learned[1 : fit.room].any())
        if has_labels and fit.too_long == "cut":
            num_cut += 1
            continue
        if fit.too_long == "stop" or (not has_labels and fit.on_error == "stop" and fit.too_long == "cut"):
            raise DataError(_too_long(corpus, number, fit, has_labels))
        lengths[number] = 0
        num_left_out += 1
    return lengths, num_cut, num_left_out


def _too_long(corpus: ChatCorpus, number: int, fit: Fit, has_labels: bool) -> str:
    length, place = int(corpus.lengths[number]), corpus.place(number)
    if has_labels:
        return (f"{place}: a conversation of {length:,} tokens, data.seq_len {fit.seq_len:,}: raise it, or set "
                "data.too_long to `cut` or `skip`")
    return (f"{place}: a prompt longer than the context: {length:,} tokens, and no answer begins within data.seq_len "
            f"{fit.seq_len:,}: raise it, or leave such conversations out with data.on_error: skip")


