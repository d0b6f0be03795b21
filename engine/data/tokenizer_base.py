"""What every tokenizer does, and text out of ids one at a time."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine.data.tokenizer_identity import TokenizerInfo
from engine.errors import DataError

REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to

Span = tuple[int, int]  # characters of a text, from the first to behind the last


class Cut(NamedTuple):
    """A text in tokens.  Token i covers the characters from `ends[i - 1]` (0 for the first) to `ends[i]`.

    A token that covers none goes on with the character, or the text, of the token before it.
    """

    ids: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int64]


class Tokenizer(ABC):
    """Text <-> ids.  `sha256` is that of its file; ids run over 0..vocab_size-1; `eod_id` ends a document."""

    kind: str
    name: str
    sha256: str
    vocab_size: int
    bos_id: int | None
    eod_id: int
    pad_id: int | None
    joins_at_newline: bool = False  # a text may be encoded in parts that begin with a line end, with the same ids
    special_texts: tuple[str, ...] = ()  # how the special ids are written, which plain text may contain by chance

    @property
    def info(self) -> TokenizerInfo:
        """What identifies it, for what is made with it."""
        return TokenizerInfo(self.kind, self.name, self.sha256, self.vocab_size, self.eod_id, self.bos_id)

    @abstractmethod
    def encode_array(self, text: str, *, continues: bool = False) -> npt.NDArray[np.int32]:
        """Ids of `text`, nothing added -> int32 [tokens].

        `continues`: the text begins with a line end and goes on with the text encoded before (`joins_at_newline` only).

        Raises:
            UnicodeEncodeError: on lone surrogates.
        """

    @property
    def specials(self) -> Mapping[str, int]:
        """How special tokens are written where a text is a template's: `encode_marked` reads them there."""
        return {}

    def _cut(self, text: str) -> Cut:
        """Plain text in tokens: the ids of `encode`."""
        raise DataError(f"the tokenizer {self.name} does not say where its tokens end, which conversations need")

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special ids give nothing, broken UTF-8 gives U+FFFD."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added."""
        return self.encode_array(text).tolist()

    def special_text(self, token_id: int | None) -> str:
        """How a special id is written in a template; empty where there is none."""
        return next((text for text, number in self.specials.items() if number == token_id), "")

    def encode_marked(self, text: str, plain: Sequence[Span] = ()) -> Cut:
        """The text of a template in tokens: special tokens are read as such, but not where text is somebody's own.

        Args:
            plain: ranges of the text in which nothing is special, ascending.

        Raises:
            DataError: the tokenizer cannot cut it.  UnicodeEncodeError: it holds lone surrogates.
        """
        return self._cut_between(text, [*self._special_spans(text, plain)])

    def _special_spans(self, text: str, plain: Sequence[Span] = ()) -> Iterator[Span]:
        """Where special tokens are written, the longest where several begin, outside of `plain`."""
        if not self.specials:
            return
        pattern = re.compile("|".join(map(re.escape, sorted(self.specials, key=len, reverse=True))))
        edges = [0, *(edge for span in plain for edge in span), len(text)]
        for start, stop in list(pairwise(edges))[::2]:
            yield from (found.span() for found in pattern.finditer(text, start, stop))

    def _cut_between(self, text: str, specials: Sequence[Span]) -> Cut:
        """Special tokens at `specials`, and what lies between them cut as texts of their own."""
        parts: list[Cut] = []
        done = 0
        for start, stop in (*specials, (len(text), len(text))):
            if start > done:
                cut = self._cut(text[done:start])
                parts.append(Cut(cut.ids, cut.ends + done))
            if stop > start:
                parts.append(Cut(np.array([self.specials[text[start:stop]]], np.int32), np.array([stop], np.int64)))
            done = stop
        if not parts:
            return Cut(np.zeros(0, np.int32), np.zeros(0, np.int64))
        return Cut(np.concatenate([part.ids for part in parts]), np.concatenate([part.ends for part in parts]))

    def stream(self) -> StreamDecoder:
        """A fresh incremental decoder, for printing while generating."""
        return StreamDecoder(self)


class StreamDecoder:
    """Ids in one at a time, text out as soon as it is certain.

    A character may need several ids (bytes of one Chinese character), and a piece's leading space depends on what is
    before it.  So decode a window that starts one settled step back, and hand out what is new unless it ends in an
    incomplete character.  All the text handed out, joined, is `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the window: settled ids, then the pending ones
        self._num_settled = 0

    def push(self, token_id: int) -> str:
        """Take one id, return the text that became certain (often one piece, sometimes nothing)."""
        self._ids.append(token_id)
        return self._advance(final=False)

    def flush(self) -> str:
        """The end: whatever was held back."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        settled = self._tokenizer.decode(self._ids[: self._num_settled])
        text = self._tokenizer.decode(self._ids)
        if len(text) <= len(settled) or (text.endswith(REPLACEMENT) and not final):
            return ""
        self._ids = self._ids[self._num_settled :]
        self._num_settled = len(self._ids)
        return text[len(settled) :]
