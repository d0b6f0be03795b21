"""Corpora made up for the tests of the reading side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.data.indexed import IndexedWriter, write_header


@dataclass(frozen=True)
class Made:
    """Enough of a SourceConfig."""

    path: str
    weight: float = 1.0
    epochs: float | None = None
    max_epochs: float | None = None


def write_corpus(prefix: Path, documents: Sequence[Sequence[int]], dtype: str = "u2") -> Path:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.asarray(document, np.int64))
    return prefix


def random_documents(num_documents: int, seed: int = 0, vocab_size: int = 1000, longest: int = 50) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, vocab_size, draw.integers(1, longest + 1)).tolist() for _ in range(num_documents)]


def numbered_corpus(prefix: Path, num_tokens: int, dtype: str = "u2") -> Path:
    """One document whose token at position p is p."""
    return write_corpus(prefix, [range(num_tokens)], dtype)


def sparse_corpus(prefix: Path, lengths: list[int], dtype: str = "<u2") -> Path:
    """Documents of zeros that take no room on disk."""
    itemsize = np.dtype(dtype).itemsize
    ends = np.cumsum([0, *lengths]) * itemsize
    with open(f"{prefix}.idx", "wb") as index:
        write_header(index, np.dtype(dtype), len(lengths), len(lengths) + 1)
        index.write(np.array(lengths, "<i4").tobytes() + ends[:-1].astype("<i8").tobytes())
        index.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
    Path(f"{prefix}.bin").touch()
    os.truncate(f"{prefix}.bin", int(ends[-1]))
    return prefix
