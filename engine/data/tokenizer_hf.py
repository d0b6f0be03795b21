"""Hugging Face fast tokenizers (`tokenizer.json`), for corpora of models that come with one (Llama 3, Qwen2).

`tokenizer.json` says how a text is cut; which of its special tokens ends a document stands in `tokenizer_config.json`
beside it (`eos_token`).  Two settings of the library are turned off, because a corpus is no prompt: truncation and
padding stored in the file, and reading special tokens out of plain text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.data.tokenizer_base import Cut, Span, Tokenizer
from engine.errors import DataError
from engine.reading import read_bytes, read_object, said, shown

MOST_IDS = 2**31 - 1  # what a corpus of int32 can hold
END_NAMES = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "<|im_end|>")  # where no config names one


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, given as the file or as the folder that holds it."""

    kind = "hf"

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.path = path / "tokenizer.json" if path.is_dir() else path
        try:
            data = read_bytes(self.path)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(f"cannot read tokenizer {self.path}: {reason}") from error
        self._tokenizer = _backend(self._definition(data), self.path)
        self.name = self.path.resolve().parent.name if self.path.name == "tokenizer.json" else self.path.name
        self.sha256 = hashlib.sha256(data + self._identity).hexdigest()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not 0 < self.vocab_size <= MOST_IDS:
            raise DataError(f"{self.path}: its largest id is {self.vocab_size - 1}; ids are 0 to {MOST_IDS - 1}")
        added = self._tokenizer.get_added_tokens_decoder()
        self._specials = {token.content: number for number, token in added.items() if token.special}
        self.special_texts = tuple(self._specials)
        config = {**self._marks, **_special_tokens(self.path.parent)}
        self.bos_id = self._id_of(config.get("bos_token"))
        self.pad_id = self._id_of(config.get("pad_token"))
        self.eod_id = self._end_of_document(config.get("eos_token"))

    def _definition(self, data: bytes) -> bytes:
        """The `tokenizer.json` of what the file holds."""
        return data

    @property
    def _identity(self) -> bytes:
        """What beside the file decides about ids."""
        return b""

    @property
    def _marks(self) -> Mapping[str, str]:
        """Special tokens that hold where no configuration names them."""
        return {}

    def encode_array(self, text: str, *, continues: bool = False) -> npt.NDArray[np.int32]:
        return np.array(self.encode(text), np.int32)

    def encode(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library's, such as an unknown token that isn't in the vocabulary
            raise DataError(f"{self.path} cannot cut the text starting {text[:40]!r}: {said(error)}") from error

    @property
    def specials(self) -> Mapping[str, int]:
        return self._specials

    def encode_marked(self, text: str, plain: Sequence[Span] = ()) -> Cut:
        """As `Tokenizer.encode_marked`; the library cuts the whole text, so that its own rules hold at special tokens.

        A text that writes a special token by itself is cut between those of the template, where that is the same.
        """
        whole = self._cut_with(self._marked_tokenizer, text)
        everywhere, meant = [*self._special_spans(text)], [*self._special_spans(text, plain)]
        if everywhere == meant:
            return whole
        if not np.array_equal(self._cut_between(text, everywhere).ids, whole.ids):
            forged = next(text[start:stop] for start, stop in everywhere if (start, stop) not in meant)
            raise DataError(f"a turn holds {forged}, which this tokenizer cannot tell from its special token")
        return self._cut_between(text, meant)

    def _cut(self, text: str) -> Cut:
        return self._cut_with(self._tokenizer, text)

    def _cut_with(self, backend: Any, text: str) -> Cut:
        text.encode()
        try:
            found = backend.encode(text, add_special_tokens=False)
        except Exception as error:  # the library's, as in `encode`
            raise DataError(f"{self.path} cannot cut the text starting {text[:40]!r}: {said(error)}") from error
        ends = [end for _, end in found.offsets]
        for i in range(len(ends) - 2, -1, -1):
            if found.offsets[i][0] == ends[i]:  # put in front of what follows, as SentencePiece's ▁ is
                ends[i] = ends[i + 1]
        return Cut(np.array(found.ids, np.int32), np.maximum.accumulate(np.array(ends, np.int64)))

    @cached_property
    def _marked_tokenizer(self) -> Any:
        """The same, reading special tokens out of the text."""
        backend = _backend(self._definition(read_bytes(self.path)), self.path)
        backend.encode_special_tokens = False
        return backend

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def _id_of(self, token: str | None) -> int | None:
        """The id of a token, None where it is none of this tokenizer's."""
        return None if token is None else self._tokenizer.token_to_id(token)

    def _end_of_document(self, token: str | None) -> int:
        names = END_NAMES if token is None else (token,)
        for name in names:
            token_id = self._id_of(name)
            if token_id is not None:
                return token_id
        raise DataError(
            f"{self.path} has no end-of-document token (looked for {', '.join(map(shown, names))}); "
            f"name it as eos_token in {self.path.parent / 'tokenizer_config.json'}"
        )


def _backend(data: bytes, path: Path) -> Any:
    try:
        from tokenizers import Tokenizer as Backend  # optional package
    except ImportError as error:
        raise DataError(
            f"{path} is a Hugging Face tokenizer, which needs the package `tokenizers`: pip install 'octant[hf]'"
        ) from error
    try:
        backend = Backend.from_buffer(data)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # Exception for every kind of broken file; a panic of its Rust is not even one
        raise DataError(f"{path} is not a tokenizer.json this version of `tokenizers` reads: {said(error)}") from error
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def _special_tokens(folder: Path) -> dict[str, str]:
    """bos/eos/pad token texts from the files beside `tokenizer.json`; the first file that names one wins."""
    found: dict[str, str] = {}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if not (folder / file).exists():
            continue
        config = read_object(folder / file, "the configuration of a tokenizer", DataError)
        for key in ("bos_token", "eos_token", "pad_token"):
            token = config.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if token is None:
                continue
            if not isinstance(token, str) or not is_text(token):
                raise DataError(f"{folder / file}: {key} is {shown(token)}, not the text of a token")
            found.setdefault(key, token)
    return found


def is_text(token: str) -> bool:
    """Whether it can be written as UTF-8: JSON can also name half of a character."""
    return not any("\ud800" <= character <= "\udfff" for character in token)
