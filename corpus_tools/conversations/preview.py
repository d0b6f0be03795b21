"""What a run sees of its samples: tokens as text, and which of them are learned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.text import Text

from engine.data.sample import Sample
from engine.data.tokenizer import Tokenizer
from engine.data.training_data import TrainingData

LEARNED, READ, SPECIAL = "bold green", "dim", "cyan"
ROLES = {1: ("",), 2: ("chosen", "rejected")}


@dataclass(frozen=True)
class Row:
    """One sequence of a sample without its padding.

    Attributes:
        role: of a pair `chosen` or `rejected`, of ranked answers their rank, else empty.
        learned: of each token, as a label.
    """

    role: str
    tokens: npt.NDArray[np.int64]
    learned: npt.NDArray[np.bool_]
    documents: npt.NDArray[np.int32]

    def record(self, index: int, source: int) -> dict[str, Any]:
        """As JSON."""
        fields = {"index": index, "source": source, "tokens": self.tokens.tolist(),
                  "loss_mask": self.learned.astype(int).tolist()}
        return fields | ({"role": self.role} if self.role else {})


def rows_of(data: TrainingData, index: int) -> tuple[Sample, list[Row]]:
    """Sample `index` of a run, and its sequences.

    Raises:
        DataError: there is no such sample, or it cannot be read.
    """
    sample = data.sample(index)
    rows = (sample, *sample.rest)
    whole = len(sample.tokens)
    lengths = data.sources[sample.source].lengths(sample.window) or (whole,) * len(rows)
    roles = ROLES.get(len(rows), tuple(f"rank {number}" for number in range(1, len(rows) + 1)))
    return sample, [_row(row, length, role) for row, length, role in zip(rows, lengths, roles, strict=True) if length]


def _row(sample: Sample, length: int, role: str) -> Row:
    labels = np.ones(len(sample.tokens) - 1, bool) if sample.loss_mask is None else sample.loss_mask
    ids = np.zeros(len(labels), np.int32) if sample.document_ids is None else sample.document_ids
    return Row(role, sample.tokens[:length], np.concatenate([[False], labels])[:length],
               np.concatenate([ids, ids[-1:]])[:length])


def coloured(row: Row, tokenizer: Tokenizer) -> Text:
    """The text of a row: learned, only read, and special tokens in colours of their own."""
    text = Text()
    for start, stop in _runs(row):
        for piece, special in _pieces(row.tokens[start:stop].tolist(), tokenizer):
            style = LEARNED if row.learned[start] else READ
            text.append(piece, f"{style} {SPECIAL}" if special and not row.learned[start] else style)
        if stop < len(row.tokens) and row.documents[stop] != row.documents[stop - 1]:
            text.append("\n┄┄┄┄\n", READ)
    return text


def _runs(row: Row) -> Iterator[tuple[int, int]]:
    """Ranges of one document in which all is learned, or nothing."""
    changes = (np.diff(row.documents) != 0) | (np.diff(row.learned.astype(np.int8)) != 0)
    edges = [0, *(np.flatnonzero(changes) + 1).tolist(), len(row.tokens)]
    yield from pairwise(edges)


def _pieces(ids: list[int], tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Text of ids, and special tokens as they are written."""
    names = {number: text for text, number in tokenizer.specials.items()}
    plain: list[int] = []
    for number in ids:
        if number in names:
            yield tokenizer.decode(plain), False
            yield names[number], True
            plain = []
        else:
            plain.append(number)
    yield tokenizer.decode(plain), False
