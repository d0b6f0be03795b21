"""What every tokenizer does, and text out of ids one at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from engine.data.tokenizer_identity import TokenizerInfo

REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to


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
        """Ids of `text`, nothing added -> int32 [tokens].  Raises UnicodeEncodeError on lone surrogates.

        `continues`: the text begins with a line end and goes on with the text encoded before (`joins_at_newline` only).
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special ids give nothing, broken UTF-8 gives U+FFFD."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added."""
        return self.encode_array(text).tolist()

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

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
