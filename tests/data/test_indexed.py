"""The format: what is written is read, Megatron agrees byte for byte, and damage has a name and numbers."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.data.index_check import CHECKED_ITEMS
from engine.data.indexed import HEADER, IndexedDataset, IndexedWriter, best_dtype, merge, write_header
from engine.errors import DataError
from tests.kit.made import random_documents, sparse_corpus, write_corpus

ids = st.integers(0, 2**16 - 1)
in_a_folder = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@in_a_folder
@given(documents=st.lists(st.lists(ids, max_size=20), max_size=20), dtype=st.sampled_from(["u2", "i4", "i8"]))
def test_what_is_written_is_read(tmp_path: Path, documents: list[list[int]], dtype: str) -> None:
    dataset = IndexedDataset(write_corpus(tmp_path / "c", documents, dtype))
    flat = [token for document in documents for token in document]
    starts = np.cumsum([0, *map(len, documents)]).tolist()
    assert (dataset.num_documents, dataset.num_tokens, dataset.dtype) == (len(documents), len(flat), np.dtype(dtype))
    assert [dataset.document(i).tolist() for i in range(len(documents))] == documents
    for start, stop in [(0, len(flat)), (len(flat) // 3, len(flat) // 2), (len(flat), len(flat))]:
        assert dataset.tokens(start, stop).tolist() == flat[start:stop]
        inside = sorted({p for p in starts if start < p < stop})
        assert dataset.document_starts(start, stop).tolist() == inside
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.bin", "c.idx"]


def test_documents_given_in_bulk_are_the_same_files(tmp_path: Path) -> None:
    documents = random_documents(50)
    write_corpus(tmp_path / "one", documents)
    with IndexedWriter(tmp_path / "bulk", "u2") as writer:
        writer.add_documents([t for d in documents[:20] for t in d], [len(d) for d in documents[:20]])
        writer.add_documents([t for d in documents[20:] for t in d], [len(d) for d in documents[20:]])
        assert (writer.num_documents, writer.num_tokens) == (50, sum(map(len, documents)))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"bulk{suffix}").read_bytes()


@pytest.mark.parametrize(
    ("vocab_size", "name"), [(256, "uint16"), (65_499, "uint16"), (65_500, "int32"), (10**6, "int32")]
)
def test_best_dtype_is_megatrons_rule(vocab_size: int, name: str) -> None:
    assert best_dtype(vocab_size).name == name


@pytest.mark.parametrize(("dtype", "token"), [("u2", 70_000), ("u2", -1), ("u2", 65_536), ("i4", 2**31), ("i4", -5)])
def test_an_id_that_does_not_fit_is_an_error_and_leaves_nothing(tmp_path: Path, dtype: str, token: int) -> None:
    with (
        pytest.raises(DataError, match=f"token id {token} does not fit"),
        IndexedWriter(tmp_path / "c", dtype) as writer,
    ):
        writer.add_document([1, 2])
        writer.add_document([3, token, 4])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match=f"token id {-5} does not fit"):
        IndexedWriter(tmp_path / "same", "i4").add_document(np.array([-5], "i4"))


def test_nothing_is_visible_before_finalize(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "deep" / "c", "u2")
    writer.add_document([1, 2, 3])
    assert not (tmp_path / "deep" / "c.bin").exists() and not (tmp_path / "deep" / "c.idx").exists()
    writer.finalize()
    assert IndexedDataset(tmp_path / "deep" / "c").document(0).tolist() == [1, 2, 3]


def test_wrong_kinds_of_tokens_are_refused(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "c", "u2")
    with pytest.raises(DataError, match="must be integers, these are float64"):
        writer.add_document([0.5, 1.0])
    with pytest.raises(DataError, match="3 tokens given for documents of 4 tokens"):
        writer.add_documents([1, 2, 3], [2, 2])
    with pytest.raises(DataError, match="float32 cannot hold token ids"):
        IndexedWriter(tmp_path / "d", "f4")


def test_merging_is_writing_all_documents_after_each_other(tmp_path: Path) -> None:
    parts = [random_documents(n, seed=n) for n in (5, 0, 17, 1)]
    prefixes = [write_corpus(tmp_path / f"part{i}", part) for i, part in enumerate(parts)]
    write_corpus(tmp_path / "whole", [document for part in parts for document in part])
    merge(prefixes, tmp_path / "merged")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"merged{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    narrow, wide = write_corpus(tmp_path / "a", [[1]]), write_corpus(tmp_path / "b", [[1]], "i4")
    with pytest.raises(DataError, match=r"int32.*uint16"):
        merge([narrow, wide], tmp_path / "c")
    with pytest.raises(DataError, match="among the inputs"):
        merge([narrow, narrow], tmp_path / "a")
    with pytest.raises(DataError, match="nothing to merge"):
        merge([], tmp_path / "c")
    assert not (tmp_path / "c.bin").exists() and not list(tmp_path.glob("*.partial"))


def test_another_process_opens_the_files_itself(tmp_path: Path) -> None:
    dataset = IndexedDataset(write_corpus(tmp_path / "c", [[1, 2], [3]]))
    assert len(pickle.dumps(dataset)) < 500
    assert pickle.loads(pickle.dumps(dataset)).document(1).tolist() == [3]
    dataset.close()
    assert dataset.document(0).tolist() == [1, 2]


def corrupt(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        file.write(data)


def test_damaged_files_are_refused_with_the_file_and_the_numbers(tmp_path: Path) -> None:
    def fresh() -> Path:
        return write_corpus(tmp_path / "c", [[1, 2, 3], [4, 5]])

    def refused(match: str) -> None:
        with pytest.raises(DataError, match=match):
            IndexedDataset(tmp_path / "c")

    prefix = fresh()
    index, data = prefix.with_suffix(".idx"), prefix.with_suffix(".bin")
    os.truncate(data, 7)
    refused(r"c\.bin: 7 bytes, but its index ends at 10 bytes")
    fresh()
    corrupt(data, -1, b"xyz")
    refused(r"c\.bin: 12 bytes, but its index ends at 10 bytes")
    for num_bytes, match in [
        (0, "0 bytes, shorter than the 34"),
        (33, "33 bytes, shorter"),
        (60, "60 bytes, but 2 sequences.*82"),
    ]:
        fresh()
        os.truncate(index, num_bytes)
        refused(match)
    for offset, content, match in [
        (0, b"X", "starts with b'XMIDIDX"),
        (9, b"\2", "version 2"),
        (17, b"\7", "dtype code 7 holds no token ids"),
        (17, b"\4", "10 bytes, but its index ends at 14 bytes"),
        (18, b"\3", "82 bytes, but 3 sequences"),
        (26, struct.pack("<Q", 2**40), "1099511627776 document marks"),
        (38, b"\1", r"c\.bin: 10 bytes, but its index ends at 8 bytes"),
        (50, b"\2", r"c\.bin: 10 bytes, but its index ends at 6 bytes"),
        (74, b"\1", "documents cover sequences 0 to 1 of 0 to 2"),
    ]:
        fresh()
        corrupt(index, offset, content)
        refused(match)
    index.unlink()
    refused(r"c\.idx: no such file.*octant prepare")


def test_asking_for_what_is_not_there(tmp_path: Path) -> None:
    dataset = IndexedDataset(write_corpus(tmp_path / "c", [[1, 2, 3]]))
    with pytest.raises(DataError, match="document 1 asked for, it holds 1"):
        dataset.document(1)
    with pytest.raises(DataError, match="tokens 2 to 4 asked for, it holds 3"):
        dataset.tokens(2, 4)
    dataset.tokens(0, 3)
    os.truncate(tmp_path / "c.bin", 2)
    with pytest.raises(DataError, match="cut short meanwhile"):
        dataset.tokens(0, 3)


def test_more_than_two_to_the_32_tokens(tmp_path: Path) -> None:
    lengths = [2**31 - 1, 2**31 - 1, 2**31 - 1, 7]
    prefix = sparse_corpus(tmp_path / "large", lengths, "<i4")
    far = 3 * (2**31 - 1)
    with open(f"{prefix}.bin", "r+b") as file:
        os.pwrite(file.fileno(), np.array([11, 22, 33], "<i4").tobytes(), 4 * (far - 1))
    dataset = IndexedDataset(prefix)
    assert dataset.num_tokens == far + 7 > 2**32
    assert dataset.document(3).tolist() == [22, 33, 0, 0, 0, 0, 0]
    assert dataset.tokens(far - 2, far + 2).tolist() == [0, 11, 22, 33]
    assert dataset.document_starts(far - 2, far + 2).tolist() == [far]
    assert dataset.document_starts(0, far).tolist() == [2**31 - 1, 2 * (2**31 - 1)]


def test_the_writers_index_counts_beyond_two_to_the_32(tmp_path: Path) -> None:
    """The index is made from lengths alone, so they can be put in its place without 12 GB of tokens."""
    writer = IndexedWriter(tmp_path / "w", "u2")
    writer._lengths.write(np.full(3, 2**31 - 1, "<i4").tobytes())
    writer.num_documents = 3
    writer.finalize()
    sparse_corpus(tmp_path / "s", [2**31 - 1] * 3)
    assert (tmp_path / "w.idx").read_bytes() == (tmp_path / "s.idx").read_bytes()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def large_index(prefix: Path, num_documents: int, length: int = 1000) -> Path:
    """Documents of zeros, written without a loop."""
    with open(f"{prefix}.idx", "wb") as index:
        write_header(index, np.dtype("<u2"), num_documents, num_documents + 1)
        index.write(np.full(num_documents, length, "<i4").tobytes())
        index.write((np.arange(num_documents) * 2 * length).astype("<i8").tobytes())
        index.write(np.arange(num_documents + 1, dtype="<i8").tobytes())
    Path(f"{prefix}.bin").touch()
    os.truncate(f"{prefix}.bin", 2 * length * num_documents)
    return prefix


def test_opening_costs_no_memory_whatever_the_size(tmp_path: Path) -> None:
    """Every number of an index of 40 MB is checked, and none of its pages stays."""
    prefix = large_index(tmp_path / "c", 2 * 10**6)
    IndexedDataset(write_corpus(tmp_path / "small", [[1]]))
    before = resident_bytes()
    dataset = IndexedDataset(prefix)
    assert dataset.num_tokens == 2 * 10**9
    assert dataset.tokens(10**9, 10**9 + 2049).tolist() == [0] * 2049
    assert resident_bytes() - before < 5 * 2**20


@pytest.mark.parametrize("num_documents", [1, 5, CHECKED_ITEMS - 1, CHECKED_ITEMS, CHECKED_ITEMS + 1, 70_001])
def test_one_wrong_number_anywhere_is_noticed_when_opened(tmp_path: Path, num_documents: int) -> None:
    """Every length and pointer, and every document mark that goes back; what an index without a side file can tell."""
    prefix = large_index(tmp_path / "c", num_documents, length=3)
    IndexedDataset(prefix)
    index = prefix.with_suffix(".idx")
    content = index.read_bytes()
    draw = np.random.default_rng(num_documents)
    last = num_documents - 1
    places = {0, last, last // 2, min(last, CHECKED_ITEMS), *draw.integers(num_documents, size=3)}
    for place in sorted(map(int, places)):
        for offset, value in (
            (HEADER.size + 4 * place, struct.pack("<i", 4)),
            (HEADER.size + 4 * place, struct.pack("<i", -3)),
            (HEADER.size + 4 * num_documents + 8 * place, struct.pack("<q", 6 * place + 2)),
            (HEADER.size + 4 * num_documents + 8 * place, struct.pack("<q", -(2**63))),
            (HEADER.size + 12 * num_documents + 8 * place, struct.pack("<q", 2**62)),
            (HEADER.size + 12 * num_documents + 8 * (place + 1), struct.pack("<q", place - 1)),
        ):
            corrupt(index, offset, value)
            with pytest.raises(DataError, match=r"The index is damaged|its index ends at"):
                IndexedDataset(prefix)
            corrupt(index, offset, content[offset : offset + len(value)])
    IndexedDataset(prefix)


class TestMegatron:
    """megatron-core 0.16.1 as the oracle."""

    @pytest.fixture(autouse=True)
    def megatron(self) -> None:
        self.torch = pytest.importorskip("torch")
        self.theirs = pytest.importorskip("megatron.core.datasets.indexed_dataset")

    def write(self, prefix: Path, documents: list[list[list[int]]], dtype: type) -> None:
        """Documents of sequences of tokens."""
        builder = self.theirs.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        for document in documents:
            for sequence in document:
                builder.add_item(self.torch.tensor(sequence))
            builder.end_document()
        builder.finalize(f"{prefix}.idx")

    @pytest.mark.parametrize("vocab_size", [1000, 65_499, 65_500, 128_256])
    def test_our_files_are_theirs_byte_for_byte(self, tmp_path: Path, vocab_size: int) -> None:
        dtype = self.theirs.DType.optimal_dtype(vocab_size)
        assert best_dtype(vocab_size) == np.dtype(dtype)
        documents = random_documents(300, vocab_size=vocab_size)
        self.write(tmp_path / "theirs", [[document] for document in documents], dtype)
        write_corpus(tmp_path / "ours", documents, np.dtype(dtype).str)
        for suffix in (".bin", ".idx"):
            assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()

    def test_they_read_ours(self, tmp_path: Path) -> None:
        documents = random_documents(40)
        read = self.theirs.IndexedDataset(str(write_corpus(tmp_path / "ours", documents)))
        assert [read[i].tolist() for i in range(len(read))] == documents
        assert read.document_indices.tolist() == list(range(41))

    def test_we_read_theirs_with_several_sequences_per_document(self, tmp_path: Path) -> None:
        documents = [[[1, 2], [3]], [[4]], [], [[5, 6, 7], [8], [9, 10]]]
        self.write(tmp_path / "theirs", documents, np.int32)
        dataset = IndexedDataset(tmp_path / "theirs")
        assert dataset.num_documents == 4 and dataset.num_sequences == 6
        assert [dataset.document(i).tolist() for i in range(4)] == [[1, 2, 3], [4], [], [5, 6, 7, 8, 9, 10]]
        assert dataset.document_starts(0, 10).tolist() == [3, 4]

    def test_merging_is_their_add_index(self, tmp_path: Path) -> None:
        self.write(tmp_path / "a", [[[1, 2], [3]], [[4]]], np.int32)
        self.write(tmp_path / "b", [[[5]], [[6, 7], [8, 9], [10]]], np.int32)
        builder = self.theirs.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
        for name in ("a", "b", "a"):
            builder.add_index(str(tmp_path / name))
        builder.finalize(str(tmp_path / "theirs.idx"))
        merge([tmp_path / "a", tmp_path / "b", tmp_path / "a"], tmp_path / "ours")
        for suffix in (".bin", ".idx"):
            assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
