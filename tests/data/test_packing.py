"""Packing: every document whole and once, learned where it should be, rows full, memory bounded."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.packing import PackedRow, pack
from engine.errors import DataError

PAD = 999_999
Document = tuple[np.ndarray, np.ndarray]


def made(lengths: list[int], seed: int = 0) -> list[Document]:
    """Tokens say their document and place; masks are random."""
    draw = np.random.default_rng(seed)
    return [(1000 * number + np.arange(length), draw.random(length) < 0.7) for number, length in enumerate(lengths)]


def documents_in(row: PackedRow, row_len: int) -> list[list[int]]:
    """The runs of tokens between the places where the document changes."""
    whole = row.tokens[: row.num_tokens].tolist()
    return [[t for t in whole if t // 1000 == number] for number in dict.fromkeys(t // 1000 for t in whole)]


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 33), max_size=60), window=st.integers(1, 20), seed=st.integers(0, 5))
def test_every_document_comes_out_whole_once_with_its_mask(lengths: list[int], window: int, seed: int) -> None:
    documents, row_len = made(lengths, seed), 32
    rows = list(pack(documents, row_len, pad_id=PAD, window_documents=window))
    numbers = [number for row in rows for number in row.documents]
    assert sorted(numbers) == [number for number, length in enumerate(lengths) if length]
    for row in rows:
        assert row.tokens.shape == (33,) and row.loss_mask.shape == row.document_ids.shape == (32,)
        assert (row.tokens.dtype, row.loss_mask.dtype, row.document_ids.dtype) == (np.int64, bool, np.int32)
        tokens = np.concatenate([documents[number][0] for number in row.documents])
        learn = np.concatenate([documents[number][1] for number in row.documents])
        assert row.num_tokens == len(tokens)
        assert row.tokens.tolist() == tokens.tolist() + [PAD] * (33 - len(tokens))
        owner = np.repeat(np.arange(len(row.documents)), [lengths[number] for number in row.documents])
        for i in range(32):
            assert row.document_ids[i] == (owner[i] if i < len(owner) else len(row.documents))
            in_document = i + 1 < len(owner) and owner[i] == owner[i + 1]
            assert row.loss_mask[i] == (in_document and learn[i + 1])


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 33), min_size=1, max_size=60), window=st.integers(1, 20))
def test_a_row_ends_only_when_nothing_that_waits_fits(lengths: list[int], window: int) -> None:
    """Against a straightforward packer that looks through the whole window each time."""
    waiting, behind, expected = list(range(min(window, len(lengths)))), window, []
    while waiting:
        row = [waiting.pop(0)]
        room = 33 - lengths[row[0]]
        while fitting := [n for n in waiting if lengths[n] <= room]:
            best = max(fitting, key=lambda n: (lengths[n], -waiting.index(n)))
            waiting.remove(best)
            row.append(best)
            room -= lengths[best]
        expected.append(tuple(row))
        waiting += range(behind, min(behind + len(row), len(lengths)))
        behind += len(row)
    assert [row.documents for row in pack(made(lengths), 32, window_documents=window)] == expected


def test_rows_are_nearly_full() -> None:
    """Lengths as in instruction corpora; a naive order fills less."""
    lengths = np.minimum(np.random.default_rng(0).lognormal(5, 0.8, 5000).astype(int) + 1, 1025).tolist()
    fill = {window: _fill(lengths, window) for window in (1, 1024)}
    assert fill[1024] > 0.99 > fill[1]


def _fill(lengths: list[int], window: int) -> float:
    rows = list(pack(((np.zeros(n), np.ones(n)) for n in lengths), 1024, window_documents=window))
    return sum(row.num_tokens for row in rows) / (1025 * len(rows))


def test_rows_come_out_while_documents_are_read() -> None:
    read = 0

    def endless() -> Iterator[Document]:
        nonlocal read
        while True:
            read += 1
            yield np.arange(1 + read % 20), np.ones(1 + read % 20)

    rows = pack(endless(), 64, window_documents=50)
    packed = 0
    for _ in range(100):
        packed += len(next(rows).documents)
        assert read <= packed + 50


def test_no_document_waits_for_ever() -> None:
    """One that fits badly is begun with when it is the oldest."""
    lengths = [20] + [33] * 500
    rows = list(pack(made(lengths), 32, window_documents=10))
    assert rows[0].documents == (0,)
    lengths = [33] * 10 + [20] + [33] * 500
    assert next(i for i, row in enumerate(pack(made(lengths), 32, window_documents=10)) if 10 in row.documents) <= 10


def test_documents_longer_than_a_row() -> None:
    documents = made([5, 80, 33, 0])
    with pytest.raises(DataError, match="Document 1: 80 tokens, a row has room for 33"):
        list(pack(documents, 32))

    def kept(too_long: str) -> dict[int, int]:
        found: dict[int, int] = {}
        for row in pack(documents, 32, too_long=too_long):  # type: ignore[arg-type]
            for token in row.tokens[: row.num_tokens].tolist():
                found[token // 1000] = found.get(token // 1000, 0) + 1
        return found

    assert kept("drop") == {0: 5, 2: 33}
    assert kept("truncate") == {0: 5, 1: 33, 2: 33}
    assert kept("split") == {0: 5, 1: 80, 2: 33}


def test_pieces_of_a_split_document_are_documents_of_their_own() -> None:
    rows = list(pack([(np.arange(50), np.ones(50))], 32, too_long="split"))
    assert [row.documents for row in rows] == [(0,), (0,)]
    assert [int(row.loss_mask.sum()) for row in rows] == [32, 16]


def test_a_mask_of_another_length_is_refused() -> None:
    with pytest.raises(DataError, match="Document 1: 3 tokens but a loss mask of 2"):
        list(pack([([1], [1]), ([1, 2, 3], [1, 0])], 8))
