"""`.tiktoken` files: a byte-level BPE as a list of `base64-of-bytes rank` lines, and nothing else.

A text is first cut into words by a regular expression; inside a word the two neighbours whose union has the lowest rank
are joined again and again, the leftmost first, and a word that is a token itself is taken whole.  Neither the
expression nor the special tokens stand in the file.  They come from `tokenizer_config.json` beside it:

    pattern                the regular expression
    added_tokens_decoder   {"100257": {"content": "<|endoftext|>"}, …}, as Hugging Face writes it

or, for what it leaves out, from the table below, in which published vocabularies are known by their number of lines.
Sources of the table: `tiktoken_ext/openai_public.py` of openai/tiktoken, `llama/tokenizer.py` of meta-llama/llama3,
`tokenization_qwen.py` of Qwen/Qwen-7B.  Expressions are written without possessive counts and `$`, which the library
`tokenizers` reads in another way than `tiktoken` does.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.reading import parse_object, read_bytes, shown

MOST_IDS = 2**31 - 1  # what a corpus of int32 can hold
LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d{1,10})\r?")
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
MARKS = r"\p{Lm}\p{Lo}\p{M}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}"
CL100K = LLAMA3.replace(r"|\s*[\r\n]+|", r"|\s+\z|\s*[\r\n]+|")  # white space at the end is one word
O200K = (rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{MARKS}]*[\p{{Ll}}{MARKS}]+{CONTRACTIONS}?|"
         rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{MARKS}]+[\p{{Ll}}{MARKS}]*{CONTRACTIONS}?|"
         r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
UNLIKE = re.compile(r"\}\+|[$^]")  # outside of classes and escapes


@dataclass(frozen=True)
class Encoding:
    """What a `.tiktoken` file leaves out: the expression that cuts words, special ids, and which of them begin a text
    and end a document."""

    pattern: str
    specials: Mapping[str, int] = field(default_factory=dict)
    marks: Mapping[str, str] = field(default_factory=dict)  # bos_token, eos_token


def _reserved(numbers: range) -> list[str]:
    return [f"<|reserved_special_token_{number}|>" for number in numbers]


def _from(first: int, *names: str) -> dict[str, int]:
    return {name: first + index for index, name in enumerate(names)}


END = {"eos_token": "<|endoftext|>"}
KNOWN = {  # by the number of lines
    50256: Encoding(GPT2, _from(50256, "<|endoftext|>"), END),  # r50k_base: GPT-2
    100256: Encoding(CL100K, {**_from(100257, "<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
                              "<|endofprompt|>": 100276}, END),  # cl100k_base
    128000: Encoding(LLAMA3, _from(  # Llama 3
        128000, "<|begin_of_text|>", "<|end_of_text|>", *_reserved(range(4)), "<|start_header_id|>",
        "<|end_header_id|>", *_reserved(range(4, 5)), "<|eot_id|>", *_reserved(range(5, 251))),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}),
    151643: Encoding(LLAMA3.replace("{1,3}", ""), _from(  # Qwen: each digit by itself
        151643, "<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{index}|>" for index in range(205))), END),
    199998: Encoding(O200K, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}, END),  # o200k_base
}


@dataclass(frozen=True)
class Tiktoken:
    """Ranks by bytes, and the rest."""

    ranks: dict[bytes, int]
    encoding: Encoding

    @property
    def vocab_size(self) -> int:
        return 1 + max(*self.ranks.values(), *self.encoding.specials.values())


def is_tiktoken(path: Path) -> bool:
    """Whether a file is one by its name or, as Llama 3's `tokenizer.model`, by its first line."""
    if path.suffix == ".tiktoken" or not path.is_file():
        return path.suffix == ".tiktoken"
    with path.open("rb") as file:
        return LINE.fullmatch(file.readline(200).removesuffix(b"\n")) is not None


def read_tiktoken(path: Path) -> Tiktoken:
    """A file and what stands beside it.

    Raises:
        ValueError: it is damaged, or nothing says how words are cut or what its special tokens are.  OSError.
    """
    ranks = parse_ranks(read_bytes(path))
    beside = path.parent / "tokenizer_config.json"
    config = parse_object(read_bytes(beside)) if beside.exists() else {}
    known = KNOWN.get(len(ranks), Encoding(""))
    pattern = config.get("pattern") or known.pattern
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"it has {len(ranks):,} tokens, which is no published vocabulary known here: write the "
                         f"regular expression that cuts its words into {beside}, as `pattern`")
    _require_alike(pattern)
    specials = _added(config) or dict(known.specials)
    taken = {*ranks.values()}
    clash = [name for name, number in specials.items() if number in taken or name.encode() in ranks]
    if clash or len({*specials.values()}) < len(specials):
        raise ValueError(f"its special tokens {shown(clash or specials)} have ids or texts that other tokens have")
    return Tiktoken(ranks, Encoding(pattern, specials, known.marks))


def parse_ranks(data: bytes) -> dict[bytes, int]:
    """Ranks by bytes.

    Raises:
        ValueError: a line is none, one is twice there, or a byte has no token, so that it could not be written.
    """
    ranks: dict[bytes, int] = {}
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = LINE.fullmatch(line)
            token, rank = base64.b64decode(found[1], validate=True), int(found[2])  # type: ignore[index]
        except (TypeError, binascii.Error):
            raise ValueError(f"line {number:,} is no base64 and rank: {shown(line[:40])}") from None
        if token in ranks or not token or rank >= MOST_IDS:
            raise ValueError(f"line {number:,} has a token that was there before, is empty, or has an id of 2^31 or "
                             f"more: {shown(line[:40])}")
        ranks[token] = rank
    if len({*ranks.values()}) < len(ranks):
        raise ValueError("two of its tokens have the same rank")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"{len(missing)} of the 256 bytes have no token, {missing[0]} is the first: it was cut short, "
                         "or is no byte-level BPE")
    return ranks


def _added(config: Mapping[str, Any]) -> dict[str, int]:
    """Special tokens of a `tokenizer_config.json`."""
    added = config.get("added_tokens_decoder")
    try:
        return {token["content"]: int(number) for number, token in (added or {}).items()
                if token["content"].encode() and 0 <= int(number) < MOST_IDS}
    except (TypeError, KeyError, ValueError, AttributeError):
        raise ValueError(f"its added_tokens_decoder is {shown(added)}, not content by id") from None


def _require_alike(pattern: str) -> None:
    """
    Raises:
        ValueError: the two libraries would cut different words.
    """
    plain = re.sub(r"\\[pP]\{\^?\w+\}|\\.", "", pattern)
    plain = re.sub(r"\[[^]]*\]", "", plain)
    if found := UNLIKE.search(plain):
        raise ValueError(f"its pattern has `{found[0]}`, which tiktoken and tokenizers read differently: write a count "
                         "without a + behind it, and the end of a text as \\z")
