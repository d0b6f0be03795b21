"""gigatoken, where it is installed: the same ids, several times faster.

It is written in Rust and used for encoding corpora only; the tokenizer it stands in for stays the reference.  A wrong
id in a corpus is never noticed later, so trust is earned three times: when it is loaded it must agree on texts made to
trip tokenizers; texts that spell a special token (`</s>`) go to the reference, since gigatoken would read the token
and a corpus is only text; and the beginning of every block of the corpus is encoded both ways and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from engine.data.tokenizer_base import Cut, Span
from engine.errors import DataError

CHECKED_CHARACTERS = 2000  # of the beginning of each block

PROBES = (
    "",
    " ",
    "  leading and  double   spaces and a tail  ",
    "tabs\tand\r\nline ends\n\n\n   \n",
    "1234567890 3.14159 1e-5 0x1F 2024-01-31",
    "def f(x):\n        return x ** 2  # comment\n",
    "ünïcödé ΑΒΓ абв עברית العربية हिन्दी ไทย 日本語 한국어 汉字漢字，。！",
    "emoji 😀👩\u200d👩\u200d👧 \ufeff \u200b \u00a0 \u3000 \u2581 \u2581\u2581 x\u2581y",
    "e\u0301 combining, ﬁ ligature, Ⅳ, ½, \x00 \x01 \x7f",
    "a" * 300 + " " * 70 + "!?" * 40,
)


class FastTokenizer(Tokenizer):
    """A tokenizer whose `encode_array` is gigatoken's; everything else is the reference's.  Made by `accelerated`."""

    def __init__(self, reference: Tokenizer, encode: Callable[[str], npt.NDArray[Any]]) -> None:
        self.reference = reference
        self.kind, self.name, self.sha256 = reference.kind, reference.name, reference.sha256
        self.vocab_size, self.bos_id = reference.vocab_size, reference.bos_id
        self.eod_id, self.pad_id = reference.eod_id, reference.pad_id
        self.joins_at_newline, self.special_texts = reference.joins_at_newline, reference.special_texts
        self._encode = encode

    def encode_array(self, text: str, *, continues: bool = False) -> npt.NDArray[np.int32]:
        if any(special in text for special in self.special_texts):
            return self.reference.encode_array(text, continues=continues)
        ids = self._encode(text).astype(np.int32)
        return ids[1:] if continues else ids  # before a line end the `▁` put in front is an id of its own

    @property
    def specials(self) -> Mapping[str, int]:
        return self.reference.specials

    def encode_marked(self, text: str, plain: Sequence[Span] = ()) -> Cut:
        return self.reference.encode_marked(text, plain)

    def _cut(self, text: str) -> Cut:
        return self.reference._cut(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.reference.decode(ids)

    def check(self, text: str) -> None:
        """Encode the beginning of a text both ways.

        Raises:
            DataError: they differ.
        """
        text = text[:CHECKED_CHARACTERS]
        if not np.array_equal(self.encode_array(text), self.reference.encode_array(text)):
            raise DataError(
                f"gigatoken and {self.name} disagree on the text starting {text[:40]!r}; "
                "use --backend reference, and please report it"
            )


def accelerated(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with gigatoken's encoding where that is installed, reads this tokenizer and passes the probes."""
    encode = _gigatoken(tokenizer)
    if encode is None:
        return tokenizer
    fast = FastTokenizer(tokenizer, encode)
    agrees = all(np.array_equal(fast.encode_array(probe), tokenizer.encode_array(probe)) for probe in PROBES)
    return fast if agrees else tokenizer


def _gigatoken(tokenizer: Tokenizer) -> Callable[[str], npt.NDArray[Any]] | None:
    try:
        import gigatoken  # optional package
    except ImportError:
        return None
    try:
        if isinstance(tokenizer, SentencePieceTokenizer):
            return gigatoken.Tokenizer.from_sentencepiece(str(tokenizer.path)).encode
        if isinstance(tokenizer, HuggingFaceTokenizer):
            return gigatoken.Tokenizer(str(tokenizer.path)).encode
    except Exception:  # what it does not support it refuses with many kinds of error: then it isn't used
        return None
    return None
