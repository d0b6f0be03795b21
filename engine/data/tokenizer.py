"""Tokenizers: text to ids and back, three kinds behind one small interface.

    bytes                       UTF-8 bytes, ids 0..255, and 256 for the end of a document
    a SentencePiece `.model`    LLaMA's kind
    a Hugging Face folder       any fast tokenizer (`tokenizer.json`), needs the extra `[hf]`

Three rules hold for all of them.  `encode` adds nothing: no beginning, no end of document.  Text is only text: a corpus
that happens to contain `</s>` or `<|endoftext|>` cannot forge the special id.  And `sha256` names the tokenizer by
content, so that tokens prepared with one are refused by a run that uses another.

**Encoding SentencePiece BPE fast.**  SentencePiece merges over a whole text with a heap, so it gets slower per byte as
texts grow.  Yet no merge can cross a place where no piece may lie: in nearly every model a `▁` (space) only stands at
the front of a piece, so the text falls apart *before each run of spaces* into words that are cut independently, with
the same result.  Words repeat (Zipf), so each is cut once and remembered.  Texts without spaces, Chinese above all, fall
apart at line ends in the same way.  Whether a model allows this is read off its pieces when it is loaded
(`_word_pattern`); one that doesn't is handed the whole text.
"""

from __future__ import annotations

import codecs
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece

from engine.data.sentencepiece_model import BPE, SPACE, SentencePieceModel, read_model
from engine.errors import DataError

REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to
LONGEST_CACHED_WORD = 40  # characters; longer words hardly ever come back
LARGEST_CACHE = 1 << 20  # words; then it starts afresh, so memory stays bounded


class Tokenizer(ABC):
    """Text <-> ids.  `sha256` identifies the content; ids run over 0..vocab_size-1; `eod_id` ends a document."""

    kind: str
    name: str
    sha256: str
    vocab_size: int
    bos_id: int | None
    eod_id: int
    pad_id: int | None
    joins_at_newline: bool = False  # a text may be encoded in parts that begin with a line end, with the same ids

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


class ByteTokenizer(Tokenizer):
    """Each UTF-8 byte is its own id; 256 ends a document.  Nothing to train and no file to lose."""

    kind = "bytes"
    name = "bytes"
    sha256 = hashlib.sha256(b"octant byte tokenizer: 256 bytes, end of document 256").hexdigest()
    vocab_size = 257
    bos_id = None
    eod_id = 256
    pad_id = None
    joins_at_newline = True

    def encode_array(self, text: str, *, continues: bool = False) -> npt.NDArray[np.int32]:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def stream(self) -> StreamDecoder:
        return _ByteStreamDecoder(self)


class _ByteStreamDecoder(StreamDecoder):
    """Bytes need no window: the codec keeps the incomplete tail itself."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(bytes([token_id])) if token_id < 256 else ""

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model` (BPE or unigram), cut word by word where its pieces allow it."""

    kind = "sentencepiece"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.model = read_model(self.path)
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        self.name = self.path.name
        self.sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()
        self.vocab_size = len(self.model.pieces)
        self.bos_id = _present(self.processor.bos_id())
        self.pad_id = _present(self.processor.pad_id())
        eod_id = _present(self.processor.eos_id())
        if eod_id is None:
            raise DataError(f"{self.path} has no end-of-sentence piece (</s>), so documents could not be ended")
        self.eod_id = eod_id
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
        cache, ids = self._cache, []
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


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """`bytes`, a SentencePiece `.model`, a Hugging Face folder or its `tokenizer.json` -> Tokenizer.

    Raises DataError where it is missing or unreadable, or when the extra `[hf]` is needed and absent.
    """
    if str(spec) == "bytes":
        return ByteTokenizer()
    path = Path(spec)
    if not path.exists():
        raise DataError(f"tokenizer {path} does not exist; give `bytes`, a SentencePiece .model or a tokenizer.json")
    if path.is_dir() and not (path / "tokenizer.json").exists() and (path / "tokenizer.model").exists():
        path = path / "tokenizer.model"
    if path.is_dir() or path.suffix == ".json":
        from engine.data.tokenizer_hf import HuggingFaceTokenizer  # optional package

        return HuggingFaceTokenizer(path)
    return SentencePieceTokenizer(path)
