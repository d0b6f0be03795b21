"""Looking at corpora: how long documents are, what one says, and exactly what a training sample contains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from engine.data.indexed import CHUNK_ITEMS, IndexedDataset
from engine.data.training_data import Sample, SourceShare

BAR_WIDTH = 40


@dataclass(frozen=True)
class LengthBin:
    """Documents of `low` to `high` tokens."""

    low: int
    high: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class Statistics:
    """What a corpus holds.  Lengths in tokens."""

    documents: int
    tokens: int
    dtype: str
    shortest: int
    longest: int
    histogram: tuple[LengthBin, ...]  # powers of two, from the first to the last that occurs

    @property
    def mean_length(self) -> float:
        return self.tokens / max(1, self.documents)


def statistics(dataset: IndexedDataset) -> Statistics:
    """One pass over the index, in bounded memory; the tokens are not read."""
    documents, tokens = np.zeros(65, np.int64), np.zeros(65, np.int64)
    shortest, longest = dataset.num_tokens, 0
    for lengths in _document_lengths(dataset):
        bins = np.frexp(lengths.astype(np.float64))[1]  # 0 for 0, else 1 + ⌊log2⌋: bin b holds 2^(b-1) … 2^b - 1
        documents += np.bincount(bins, minlength=65)
        np.add.at(tokens, bins, lengths)
        shortest, longest = min(shortest, int(lengths.min())), max(longest, int(lengths.max()))
    filled = np.flatnonzero(documents)
    histogram = tuple(
        LengthBin((1 << b) >> 1, max(0, (1 << b) - 1), int(documents[b]), int(tokens[b]))
        for b in (range(filled[0], filled[-1] + 1) if filled.size else ())
    )
    return Statistics(dataset.num_documents, dataset.num_tokens, dataset.dtype.name, shortest, longest, histogram)


def _document_lengths(dataset: IndexedDataset) -> Iterator[np.ndarray]:
    """Tokens per document, in chunks of int64."""
    for start in range(0, dataset.num_documents, CHUNK_ITEMS):
        marks = np.array(dataset.document_indices[start : start + CHUNK_ITEMS + 1])
        starts = np.full(len(marks), dataset.num_tokens)
        inside = marks < dataset.num_sequences
        starts[inside] = dataset.sequence_pointers[marks[inside]] // dataset.dtype.itemsize
        yield np.diff(starts)


def histogram_lines(found: Statistics) -> list[str]:
    """The histogram as text, a bar per row in proportion to its documents."""
    most = max((row.documents for row in found.histogram), default=1)
    lines = [f"{'tokens per document':>23}  {'documents':>13}  {'tokens':>18}"]
    for row in found.histogram:
        bar = "█" * -(-BAR_WIDTH * row.documents // most)
        lines.append(f"{row.low:>10,} – {row.high:>10,}  {row.documents:>13,}  {row.tokens:>18,}  {bar}".rstrip())
    return lines


def share_lines(shares: Sequence[SourceShare]) -> list[str]:
    """What a run takes from every source, as a table."""
    width = max(len("source"), *(len(share.name) for share in shares))
    lines = [
        f"{'source':<{width}}  {'share':>7}  {'samples':>13}  {'tokens':>19}  {'epochs':>8}  {'corpus tokens':>19}"
    ]
    for share in shares:
        lines.append(
            f"{share.name:<{width}}  {share.share:>7.2%}  {share.samples:>13,}  {share.tokens:>19,}  "
            f"{share.epochs:>8.3f}  {share.source_tokens:>19,}"
        )
    return lines


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one document whose targets are all learned, or all not."""

    document: int
    learned: bool
    tokens: np.ndarray


def segments(sample: Sample) -> list[Segment]:
    """The targets of a sample, `tokens[1:]`, cut where the document or the loss mask changes."""
    targets = sample.tokens[1:]
    length = len(targets)
    learned = np.ones(length, bool) if sample.loss_mask is None else sample.loss_mask
    documents = np.zeros(length, np.int32) if sample.document_ids is None else sample.document_ids
    cuts = np.flatnonzero((np.diff(documents) != 0) | (np.diff(learned.astype(np.int8)) != 0)) + 1
    edges = [0, *cuts.tolist(), length]
    return [
        Segment(int(documents[start]), bool(learned[start]), targets[start:stop])
        for start, stop in pairwise(edges)
    ]
