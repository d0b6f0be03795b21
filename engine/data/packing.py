"""Best-fit-decreasing packing: short documents, such as conversations, side by side in rows of a fixed length.

Padding every document to the row length wastes most of an instruction corpus; cutting a concatenated stream into rows
tears documents apart.  Packing places whole documents in rows like parcels in vans: the largest first, each in the row
with the least room that still holds it, or in a new one (bin packing's best fit decreasing, at most 11/9 of the fewest
rows and one; Johnson 1973).  Rooms are whole numbers below the row length, so that the rows with room are found by a
bit mask, and a million documents take two seconds.

Which documents share a row follows from their lengths alone, so every rank computes the same rows and a run that is
resumed finds its place by the number of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def pack(lengths: npt.ArrayLike, room: int) -> list[list[int]]:
    """Rows of documents, by number: ascending within a row, and rows by their first document.

    Args:
        lengths: of the documents; one of length 0 is in no row.
        room: tokens of a row, at least the longest length.
    """
    known = np.asarray(lengths, np.int64)
    rows: list[list[int]] = []
    waiting: list[list[int]] = [[] for _ in range(room + 1)]      # rows by the room they have left
    open_rooms = 0                                                # bit r: some row has room r
    for document in np.argsort(-known, kind="stable").tolist():
        length = int(known[document])
        if length == 0:
            break
        fitting = open_rooms >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            row = waiting[left].pop()
            if not waiting[left]:
                open_rooms ^= 1 << left
        else:
            left, row = room, len(rows)
            rows.append([])
        rows[row].append(document)
        left -= length
        if left:
            waiting[left].append(row)
            open_rooms |= 1 << left
    return sorted(sorted(row) for row in rows)


def laid_out(
    documents: Sequence[tuple[np.ndarray, np.ndarray]], row_len: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents end to end in one row of `row_len` inputs, each given as tokens and which of them are to be learned.

    Returns:
        tokens, int64 [row_len + 1]: the first `row_len` are inputs and the last `row_len` targets;
        loss mask, bool [row_len]: off on padding and where the target begins another document;
        document ids, int32 [row_len]: 0, 1, … in the row; padding has one of its own.
    """
    tokens = np.full(row_len + 1, pad_id, np.int64)
    learn = np.zeros(row_len + 1, bool)
    owner = np.full(row_len + 1, len(documents), np.int32)
    end = 0
    for place, (own, learned) in enumerate(documents):
        start, end = end, end + len(own)
        tokens[start:end], learn[start:end], owner[start:end] = own, learned, place
    return tokens, learn[1:] & (owner[1:] == owner[:-1]), owner[:-1]
