"""Best-fit packing: short documents, such as conversations, side by side in rows of a fixed length.

Padding every document to the row length wastes most of an instruction corpus; cutting a concatenated stream
into rows tears documents apart.  Packing places whole documents in rows like parcels in vans.  A row is begun
with the document that has waited longest and filled with the largest waiting document that still fits, again
and again until none does (best fit by room, over a window of `window_documents` waiting documents).  Memory is
bounded by that window, no document waits for more than `window_documents` rows, and with a window of some
hundreds of short documents less than one percent of the room stays empty.

A row is what training reads (`engine.data.training_data.Sample`): `row_len + 1` tokens, of which the first
`row_len` are inputs and the last `row_len` targets.  `document_ids` keeps attention and positions within a
document; the last token of a document must not predict the first of the next, so the loss mask is off there, on
padding, and wherever the target is not to be learned (the prompt).
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import numpy.typing as npt

from engine.errors import DataError

WINDOW_DOCUMENTS = 1024
TooLong = Literal["error", "truncate", "split", "drop"]


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Several documents in one row, the rest padding."""

    tokens: np.ndarray  # int64 [row_len + 1]
    loss_mask: np.ndarray  # bool [row_len]: learn tokens[1:][i]
    document_ids: np.ndarray  # int32 [row_len]: 0, 1, … in the row; padding has an id of its own
    num_tokens: int  # of documents, without padding
    documents: tuple[int, ...]  # their numbers in the input (a document that was split has several rows)


@dataclass(frozen=True, slots=True)
class _Waiting:
    number: int
    tokens: np.ndarray  # int64 [length]
    learn: np.ndarray  # bool [length]


def pack(
    documents: Iterable[tuple[npt.ArrayLike, npt.ArrayLike]],
    row_len: int,
    *,
    pad_id: int = 0,
    too_long: TooLong = "error",
    window_documents: int = WINDOW_DOCUMENTS,
) -> Iterator[PackedRow]:
    """Pack (tokens, mask) pairs, where mask says which tokens are to be learned, into rows of `row_len` inputs.

    Streaming: rows come out while documents are read.  A row has room for `row_len + 1` tokens; for longer
    documents `too_long` decides: "error", "truncate" (keep the beginning), "split" (into pieces that are
    documents of their own) or "drop".  Empty documents are passed over.  The result depends on nothing but the
    arguments.

    Raises:
        DataError: a mask has another length than its tokens, or a document is too long.
    """
    pieces = _fitting(documents, row_len + 1, too_long)
    window = _Window(islice(pieces, window_documents))
    while window:
        row = [window.take_oldest()]
        room = row_len + 1 - len(row[0].tokens)
        while (found := window.take_largest(room)) is not None:
            row.append(found)
            room -= len(found.tokens)
        yield _assemble(row, row_len, pad_id)
        for piece in islice(pieces, len(row)):
            window.add(piece)


def _fitting(
    documents: Iterable[tuple[npt.ArrayLike, npt.ArrayLike]], room: int, too_long: TooLong
) -> Iterator[_Waiting]:
    """Documents as arrays, none empty and none longer than a row."""
    for number, (raw_tokens, raw_mask) in enumerate(documents):
        tokens, learn = np.asarray(raw_tokens, np.int64), np.asarray(raw_mask, bool)
        if tokens.ndim != 1 or tokens.shape != learn.shape:
            raise DataError(f"Document {number}: {tokens.size} tokens but a loss mask of {learn.size}.")
        if len(tokens) > room and too_long == "error":
            raise DataError(
                f"Document {number}: {len(tokens)} tokens, a row has room for {room}. Raise data.seq_len, or choose to "
                "truncate, split or drop such documents."
            )
        if len(tokens) > room and too_long == "drop":
            continue
        for start in range(0, len(tokens) if too_long == "split" else min(1, len(tokens)), room):
            yield _Waiting(number, tokens[start : start + room], learn[start : start + room])


class _Window:
    """Waiting documents by age and by length.  `_sorted` is (length, -ticket): of equals the oldest is last."""

    def __init__(self, documents: Iterable[_Waiting]) -> None:
        self._waiting: dict[int, _Waiting] = {}
        self._by_age: deque[int] = deque()
        self._sorted: list[tuple[int, int]] = []
        self._next_ticket = 0
        for document in documents:
            self.add(document)

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, document: _Waiting) -> None:
        ticket = self._next_ticket
        self._next_ticket += 1
        self._waiting[ticket] = document
        self._by_age.append(ticket)
        insort(self._sorted, (len(document.tokens), -ticket))

    def take_oldest(self) -> _Waiting:
        while self._by_age[0] not in self._waiting:
            self._by_age.popleft()
        ticket = self._by_age.popleft()
        document = self._waiting.pop(ticket)
        del self._sorted[bisect_right(self._sorted, (len(document.tokens), -ticket)) - 1]
        return document

    def take_largest(self, room: int) -> _Waiting | None:
        """The largest document of at most `room` tokens, if there is one."""
        place = bisect_right(self._sorted, (room, 0)) - 1
        if place < 0:
            return None
        _, ticket = self._sorted.pop(place)
        return self._waiting.pop(-ticket)


def _assemble(row: list[_Waiting], row_len: int, pad_id: int) -> PackedRow:
    """Lay documents end to end, then shift what is known per token to inputs and targets."""
    tokens = np.full(row_len + 1, pad_id, np.int64)
    learn = np.zeros(row_len + 1, bool)
    owner = np.full(row_len + 1, len(row), np.int32)
    end = 0
    for place, document in enumerate(row):
        start, end = end, end + len(document.tokens)
        tokens[start:end], learn[start:end], owner[start:end] = document.tokens, document.learn, place
    loss_mask = learn[1:] & (owner[1:] == owner[:-1])
    return PackedRow(tokens, loss_mask, owner[:-1], end, tuple(document.number for document in row))
