"""A `.tiktoken` file as the Hugging Face tokenizer that gives the same ids (`engine.config.tiktoken` reads the file).

The library `tokenizers` ranks pairs, tiktoken ranks what they make: so every way to cut a token into two tokens becomes
a pair, ranked by (rank of the union, of the left part, of the right part), and `ignore_merges` takes a word that is a
token whole.  Bytes are written with GPT-2's printable stand-ins.  What trains and what is exported is this one object.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from engine.config.tiktoken import Tiktoken, read_tiktoken
from engine.data.tokenizer_hf import HuggingFaceTokenizer
from engine.errors import DataError

PLAIN = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


class TiktokenTokenizer(HuggingFaceTokenizer):
    """Byte-level BPE of a list of ranks."""

    kind = "tiktoken"

    def _definition(self, data: bytes) -> bytes:
        try:
            self._file = read_tiktoken(self.path)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path} cannot be read as a .tiktoken file: {error}") from None
        self.tokenizer_json = tiktoken_json(self._file)
        return json.dumps(self.tokenizer_json, ensure_ascii=False).encode("utf-8", "surrogatepass")

    @property
    def named_specials(self) -> dict[str, str]:
        """`bos_token`, `eos_token`, `pad_token`, as far as there are."""
        ids = {"bos_token": self.bos_id, "eos_token": self.eod_id, "pad_token": self.pad_id}
        return {key: self.special_text(number) for key, number in ids.items() if number is not None}

    @property
    def _identity(self) -> bytes:
        """Beside the file: how words are cut, and the special ids."""
        return json.dumps([self._file.encoding.pattern, sorted(self._file.encoding.specials.items())]).encode()

    @property
    def _marks(self) -> Mapping[str, str]:
        return self._file.encoding.marks


def tiktoken_json(file: Tiktoken) -> dict[str, Any]:
    """`tokenizer.json` of the ranks, as `TikTokenConverter` of transformers makes it, and the ids of special tokens."""
    names, ranks, specials = byte_names(), file.ranks, file.encoding.specials
    written = {token: "".join(names[byte] for byte in token) for token in ranks}
    pairs = [(rank, ranks[token[:cut]], ranks[token[cut:]], token[:cut], token[cut:])
             for token, rank in ranks.items() for cut in range(1, len(token))
             if token[:cut] in ranks and token[cut:] in ranks]
    split = {"type": "Split", "pattern": {"Regex": file.encoding.pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": number, "content": text, **PLAIN, "special": True}
                         for text, number in sorted(specials.items(), key=lambda item: item[1])],
        "normalizer": None, "post_processor": None, "decoder": level,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "model": {"type": "BPE", "ignore_merges": True, "vocab": {**{written[token]: rank for token, rank in
                                                                      ranks.items()}, **specials},
                  "merges": [(written[left], written[right]) for *_, left, right in sorted(pairs)]},
    }  # fmt: skip


def byte_names() -> list[str]:
    """GPT-2's map: a printable Latin-1 byte stands for itself, the others follow from U+0100 on."""
    printable = [33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255 for byte in range(256)]
    return [chr(byte if printable[byte] else 256 + printable[:byte].count(False)) for byte in range(256)]
