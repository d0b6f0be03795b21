"""SentencePiece `.model` files, cut word by word where their pieces allow it.

SentencePiece merges over a whole text with a heap, so it gets slower per byte as texts grow.  Yet no merge can cross a
place where no piece may lie.  In nearly every BPE model a `▁` (space) only stands at the front of a piece, so the text
falls apart *before each run of spaces* into words that are cut independently, with the same ids.  Words repeat (Zipf),
so each is cut once and remembered.  Texts without spaces, Chinese above all, fall apart at line ends in the same way.
Whether a model allows this is read off its pieces (`_word_pattern`); one that doesn't is handed the whole text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.data.sentencepiece_model import (
    BPE,
    BYTE,
    CONTROL,
    SPACE,
    UNKNOWN,
    SentencePieceModel,
    open_model,
    parse_cut,
)
from engine.data.tokenizer_base import Cut, Tokenizer
from engine.errors import DataError

LONGEST_CACHED_WORD = 40  # characters; longer words hardly ever come back
LARGEST_CACHE = 1 << 20  # words; then it starts afresh, so memory stays bounded


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model` (BPE or unigram), cut word by word where its pieces allow it."""

    kind = "sentencepiece"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        opened = open_model(self.path)
        self.model, self.processor = opened.model, opened.processor
        self.name = self.path.name
        self.sha256 = hashlib.sha256(opened.data).hexdigest()
        self.vocab_size = len(self.model.pieces)
        self.bos_id = _present(self.processor.bos_id())
        self.pad_id = _present(self.processor.pad_id())
        eod_id = _present(self.processor.eos_id())
        if eod_id is None:
            raise DataError(f"{self.path} has no end-of-sentence piece (</s>), so documents could not be ended")
        self.eod_id = eod_id
        pieces = self.model.pieces
        self.special_texts = tuple(piece.text for piece in pieces if piece.type in (CONTROL, UNKNOWN))
        self._specials = {piece.text: number for number, piece in enumerate(pieces) if piece.type == CONTROL}
        self._words = _word_pattern(self.model)
        self.joins_at_newline = self._words is not None and r"\n" in self._words.pattern
        self._space = next((i for i, piece in enumerate(self.model.pieces) if piece.text == SPACE), 0)
        self._cache: dict[str, list[int]] = {}

    def encode_array(self, text: str, *, continues: bool = False) -> npt.NDArray[np.int32]:
        if self._words is None:
            return np.array(self.processor.encode(text), np.int32)
        return np.array(self._encode_words(self._words, text, continues), np.int32)

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text) if self._words is None else self._encode_words(self._words, text, False)

    def _encode_words(self, pattern: re.Pattern[str], text: str, continues: bool) -> list[int]:
        if not text:
            return []
        cache = self._cache
        ids: list[int] = []
        for word in pattern.findall(("" if continues else SPACE) + text.replace(" ", SPACE)):
            known = cache.get(word)
            ids += self._encode_word(word) if known is None else known
        return ids

    def _encode_word(self, word: str) -> list[int]:
        """Ids of one word: SentencePiece puts its own `▁` in front, so that one is taken off (or its id is)."""
        if word == SPACE:
            ids = [self._space]
        elif word[0] == SPACE:
            ids = self.processor.encode(word[1:])
        else:  # a line end and what follows: the `▁` put in front stays a piece of its own
            ids = self.processor.encode(word)[1:]
        if len(word) <= LONGEST_CACHED_WORD:
            if len(self._cache) >= LARGEST_CACHE:
                self._cache.clear()
            self._cache[word] = ids
        return ids

    @property
    def specials(self) -> Mapping[str, int]:
        return self._specials

    def _cut(self, text: str) -> Cut:
        """The library counts in bytes, and of the bytes of a character that is no piece only the last one has it.

        The ▁ that it puts in front belongs to what follows.
        """
        data = text.encode()
        cut = parse_cut(self.processor.encode(text, out_type="serialized_proto"))
        ids, ends = np.array([token for token, _ in cut], np.int32), np.array([end for _, end in cut], np.int64)
        for i in range(len(ids) - 2, -1, -1):
            if ends[i] == 0 or (self.model.pieces[ids[i]].type == BYTE and ends[i] == ends[i - 1]):
                ends[i] = ends[i + 1]
        begins = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80
        return Cut(ids, np.cumsum([0, *begins], dtype=np.int64)[ends])

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.decode([int(i) for i in ids])


def _present(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None


def _word_pattern(model: SentencePieceModel) -> re.Pattern[str] | None:
    """What matches one independently cut word of a model's normalised text, or None where there is no such thing.

    Words end before a run of `▁` unless some piece has a `▁` behind another character, and before a line end unless
    some piece joins a line end to something.
    """
    if model.model_type != BPE or not model.normalises_nothing or model.space_as_suffix:
        return None
    texts = [piece.text for piece in model.pieces]
    if SPACE not in texts or any(re.search(f"[^{SPACE}]{SPACE}", text) for text in texts):
        return None
    if any("\n" in text and len(text) > 1 for text in texts):
        return re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")
    return re.compile(rf"{SPACE}*[^{SPACE}\n]+|\n[^{SPACE}\n]*|{SPACE}+")
