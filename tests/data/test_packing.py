"""Best-fit decreasing: nothing lost, nothing too long, few rows, and a row learns what its documents would alone."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.packing import laid_out, pack


def plain(lengths: list[int], room: int) -> int:
    """Rows of the textbook's algorithm: each document, largest first, into the fullest row that has room."""
    rooms: list[int] = []
    for length in sorted(filter(None, lengths), reverse=True):
        fitting = [i for i, left in enumerate(rooms) if left >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(room - length)
    return len(rooms)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=60), st.integers(40, 90))
def test_every_document_once_in_rows_that_hold_it(lengths: list[int], room: int) -> None:
    rows = pack(lengths, room)
    assert sorted(document for row in rows for document in row) == [i for i, length in enumerate(lengths) if length]
    assert all(sum(lengths[i] for i in row) <= room for row in rows)
    assert rows == sorted(sorted(row) for row in rows) == pack(np.array(lengths, np.int64), room)
    assert len(rows) == plain(lengths, room)


def test_little_room_stays_empty() -> None:
    lengths = np.random.default_rng(0).integers(10, 600, 5000)
    rows = pack(lengths, 2048)
    assert 1 - lengths.sum() / (len(rows) * 2048) < 0.005


def test_a_hundred_thousand_take_no_time() -> None:
    lengths = np.random.default_rng(0).integers(1, 4096, 100_000)
    start = time.process_time()
    pack(lengths, 4097)
    assert time.process_time() - start < 5


def test_a_row_by_hand() -> None:
    documents = [(np.array([5, 6, 7]), np.array([False, True, True])), (np.array([8, 9]), np.array([True, True]))]
    tokens, mask, ids = laid_out(documents, 6, pad_id=1)
    assert tokens.tolist() == [5, 6, 7, 8, 9, 1, 1]
    assert mask.tolist() == [True, True, False, True, False, False], "7 does not predict 8, and 9 no padding"
    assert ids.tolist() == [0, 0, 0, 1, 1, 2]
    assert (tokens.dtype, mask.dtype, ids.dtype) == (np.int64, bool, np.int32)


@pytest.mark.parametrize("row_len", [4, 5])
def test_a_row_that_is_full_has_no_padding(row_len: int) -> None:
    documents = [(np.arange(5), np.ones(5, bool))]
    tokens, mask, ids = laid_out(documents, row_len, pad_id=9) if row_len == 4 else laid_out(documents, 5, 9)
    assert tokens.tolist() == [0, 1, 2, 3, 4, 9][: row_len + 1] and mask.sum() == 4
    assert ids.tolist() == [0] * min(5, row_len)
