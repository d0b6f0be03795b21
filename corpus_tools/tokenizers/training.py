"""Training a SentencePiece BPE the way LLaMA's was trained.

BPE starts from characters and keeps joining the most frequent neighbours until the vocabulary is full.  LLaMA's
choices, kept here: characters outside the vocabulary fall back to their UTF-8 bytes, so nothing is ever unknown; every
digit stands alone, so numbers are spelled; the text is not normalised and runs of spaces are kept, so decoding gives
back what was encoded.  Ids: 0 `<unk>`, 1 `<s>`, 2 `</s>`, 3..258 the bytes, then the pieces by rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from engine.errors import DataError, RequestError

NUM_RESERVED = 259  # <unk>, <s>, </s> and 256 bytes
LONGEST_LINE_BYTES = 4192  # SentencePiece skips longer ones, so longer ones are cut


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    output: str | Path,
    *,
    character_coverage: float = 0.9995,
    max_lines: int = 2_000_000,
    num_threads: int = 4,
) -> Path:
    """Train on documents and write `<output>.model` (and `.vocab`); returns the model's path.

    `character_coverage` is the share of characters that get a piece of their own, the rest being bytes; `max_lines`
    lines, drawn evenly, bound memory.  Raises RequestError where the vocabulary is too small, or too large for the
    text.
    """
    if vocab_size <= NUM_RESERVED:
        raise RequestError(
            f"--vocab-size {vocab_size} is too small: {NUM_RESERVED} ids are taken by <unk>, <s>, </s> and 256 bytes"
        )
    path = Path(output)
    path = path.with_name(path.name.removesuffix(".model") + ".model")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = _Lines(texts)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_prefix=str(path.with_suffix("")),
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=character_coverage,
            input_sentence_size=max_lines,
            shuffle_input_sentence=True,
            num_threads=num_threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explained(error, vocab_size, lines.num_bytes) from error
    return path


class _Lines:
    """The non-empty lines of documents, cut to what the trainer takes, counted as they pass."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.num_bytes = 0

    def __iter__(self) -> Iterator[str]:
        longest = LONGEST_LINE_BYTES // 4  # characters: at most four bytes each
        for text in self._texts:
            for line in text.split("\n"):
                for start in range(0, len(line), longest):
                    part = line[start : start + longest].replace("\0", "")  # the trainer refuses NUL
                    self.num_bytes += len(part.encode())
                    if part:
                        yield part


def _explained(error: RuntimeError, vocab_size: int, num_bytes: int) -> DataError | RequestError:
    if num_bytes == 0:
        return DataError("there is no text to train a tokenizer on: every document is empty")
    return RequestError(
        f"a vocabulary of {vocab_size} could not be trained on {num_bytes:,} bytes of text; "
        f"give more text or a smaller --vocab-size (SentencePiece: {str(error).strip().splitlines()[-1]})"
    )
