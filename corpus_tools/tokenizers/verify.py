"""Do all implementations cut a corpus alike: ours, SentencePiece, the folder exported for Hugging Face, gigatoken?

A difference of one id in a million tokens makes a converted model subtly wrong, and nobody notices.  So every document
and every line of it is encoded every way and compared id by id.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from corpus_tools.tokenizers.export import export_hf_tokenizer
from corpus_tools.tokenizers.fast_backend import FastTokenizer, accelerated
from engine.data.tokenizer import SentencePieceTokenizer, Tokenizer
from engine.errors import RequestError

NUM_EXAMPLES = 10
CONTEXT_TOKENS = 4

Encode = Callable[[str], list[int]]


@dataclass
class VerifyReport:
    """What was compared, and where the others differ from ours."""

    num_texts: int = 0
    num_tokens: int = 0
    num_different: dict[str, int] = field(default_factory=dict)  # per other implementation
    num_changed_by_decoding: int = 0  # decode(encode(text)) != text: normal where a model normalises
    examples: list[str] = field(default_factory=list)

    @property
    def differences(self) -> int:
        return sum(self.num_different.values())

    def text(self) -> str:
        """The report for people."""
        lines = [f"{self.num_texts:,} texts, {self.num_tokens:,} tokens"]
        lines += [f"ours = {other}: {count:,} differences" for other, count in self.num_different.items()]
        lines.append(f"decoding does not give the text back: {self.num_changed_by_decoding:,}")
        return "\n".join(lines + self.examples)


def verify_tokenizer(tokenizer: Tokenizer, texts: Iterable[str]) -> VerifyReport:
    """Compare on each text and each of its lines.

    Raises:
        RequestError: `transformers` isn't installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        export_hf_tokenizer(tokenizer, folder)
        others = {"exported Hugging Face tokenizer": _hugging_face(folder)}
    if isinstance(tokenizer, SentencePieceTokenizer):
        others = {"SentencePiece": tokenizer.processor.encode, **others}
    fast = accelerated(tokenizer)
    if isinstance(fast, FastTokenizer):
        others["gigatoken"] = fast.encode
    report = VerifyReport(num_different=dict.fromkeys(others, 0))
    for text in texts:
        lines = text.split("\n")
        for part in [text, *lines] if len(lines) > 1 else lines:
            _compare(tokenizer, others, part, report)
    return report


def _hugging_face(folder: str) -> Encode:
    try:
        from transformers import AutoTokenizer  # optional package
    except ImportError as error:
        raise RequestError("comparing with Hugging Face needs transformers: pip install 'octant[hf]'") from error
    backend: Any = AutoTokenizer.from_pretrained(folder)
    return lambda text: backend(text, add_special_tokens=False, verbose=False)["input_ids"]


def _compare(tokenizer: Tokenizer, others: dict[str, Encode], text: str, report: VerifyReport) -> None:
    ours = tokenizer.encode(text)
    report.num_texts += 1
    report.num_tokens += len(ours)
    report.num_changed_by_decoding += tokenizer.decode(ours) != text
    for name, encode in others.items():
        theirs = list(encode(text))
        if theirs != ours:
            report.num_different[name] += 1
            if len(report.examples) < NUM_EXAMPLES:
                report.examples.append(_example(tokenizer, name, ours, theirs))


def _example(tokenizer: Tokenizer, name: str, ours: list[int], theirs: list[int]) -> str:
    """The first difference, with the text around it."""
    pairs = zip(ours, theirs, strict=False)
    first = next((i for i, (mine, other) in enumerate(pairs) if mine != other), min(len(ours), len(theirs)))
    near = slice(max(0, first - CONTEXT_TOKENS), first + CONTEXT_TOKENS)
    return f"  {name}: near {tokenizer.decode(ours[near])!r} ours {ours[near]}, theirs {theirs[near]}"
