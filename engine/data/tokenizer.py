"""Tokenizers: text to ids and back, four kinds behind one small interface.

    bytes                       UTF-8 bytes, ids 0..255, and 256 for the end of a document
    a SentencePiece `.model`    LLaMA's kind (`tokenizer_sentencepiece`)
    a Hugging Face folder       any fast tokenizer, needs the extra `[hf]` (`tokenizer_hf`)
    a `.tiktoken` file          ranks of bytes, as OpenAI, Llama 3 and Qwen publish them (`tokenizer_tiktoken`)

Three rules hold for all of them.  `encode` adds nothing: no beginning, no end of document.  Text is only text: a corpus
that happens to contain `</s>` or `<|endoftext|>` cannot forge the special id.  And `info` names the tokenizer by
content, so that tokens prepared with one are refused by a run that uses another (`tokenizer_identity`).
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.config.tiktoken import is_tiktoken
from engine.config.vocabulary import tokenizer_file
from engine.data.tokenizer_base import Cut, StreamDecoder, Tokenizer
from engine.data.tokenizer_hf import HuggingFaceTokenizer
from engine.data.tokenizer_sentencepiece import SentencePieceTokenizer
from engine.data.tokenizer_tiktoken import TiktokenTokenizer
from engine.errors import DataError
from engine.instead import instead_of_tokenizer

__all__ = [
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "StreamDecoder",
    "TiktokenTokenizer",
    "Tokenizer",
    "load_tokenizer",
]

END_OF_DOCUMENT = "<|endoftext|>"  # how the byte tokenizer's id 256 is written


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

    @property
    def specials(self) -> Mapping[str, int]:
        return {END_OF_DOCUMENT: self.eod_id}

    def _cut(self, text: str) -> Cut:
        ids = self.encode_array(text)
        return Cut(ids, np.cumsum((ids & 0xC0) != 0x80, dtype=np.int64))  # bytes that begin a character

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


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """`bytes`, a SentencePiece `.model`, a `.tiktoken` file, a Hugging Face folder or its `tokenizer.json`.

    Raises:
        DataError: it is missing or unreadable, or the extra `[hf]` is needed and absent.
    """
    if str(spec) == "bytes":
        return ByteTokenizer()
    path = Path(spec)
    if not path.exists():
        instead = instead_of_tokenizer(spec) or "; give `bytes`, a .model, a .tiktoken or a tokenizer.json"
        raise DataError(f"tokenizer {path} does not exist{instead}")
    path = tokenizer_file(path)
    if is_tiktoken(path):
        return TiktokenTokenizer(path)
    if path.is_dir() or path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    return SentencePieceTokenizer(path)
