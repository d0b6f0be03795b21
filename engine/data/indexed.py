"""Corpora on disk: Megatron's `.bin` and `.idx`, read without being loaded and written byte for byte as Megatron does.

`PREFIX.bin` is nothing but the token ids of all documents, one after the other.  `PREFIX.idx` says where they start:

    offset  bytes    content
    0       9        "MMIDIDX\\0\\0"
    9       8        version, 1                                   (all numbers little-endian)
    17      1        dtype code: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 8 u16   (6 f64 and 7 f32 hold no tokens)
    18      8        S, number of sequences
    26      8        D + 1, number of documents + 1
    34      4·S      tokens per sequence, i32
    34+4·S  8·S      byte in .bin at which a sequence starts, i64
    34+12·S 8·(D+1)  first sequence of every document, and S at the end, i64

A document is one sequence in everything Octant writes; foreign files may use several.  Sequences lie back to back, so
the number of tokens is the last pointer plus the last length, and every other number of the index is determined by its
neighbours: opening checks them all (`engine.data.index_check`).

The index is memory-mapped.  Tokens are read with `pread` rather than mapped: a sample is one small contiguous
read, so it costs one request on a network file system, leaves nothing in the process's memory, and a file cut
short or a failing disk is an error with a name instead of a SIGBUS.  (Format: Megatron-LM,
`megatron/core/datasets/indexed_dataset.py`.)
"""

from __future__ import annotations

import mmap
import os
import shutil
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from engine.data.index_check import IndexLayout, first_divided_document, index_problems
from engine.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPE_OF_CODE: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}
CHUNK_ITEMS = 1 << 20
MAX_SEQUENCE_TOKENS = 2**31 - 1


def best_dtype(vocab_size: int) -> np.dtype:
    """The dtype Megatron's writer takes: u16 below 65,500 ids, else i32."""
    return np.dtype("<u2") if vocab_size < 65_500 else np.dtype("<i4")


def bin_path(prefix: str | os.PathLike[str]) -> Path:
    return Path(f"{os.fspath(prefix)}.bin")


def idx_path(prefix: str | os.PathLike[str]) -> Path:
    return Path(f"{os.fspath(prefix)}.idx")


class IndexedDataset:
    """A corpus of tokenized documents, opened in constant memory.

    `checked`: the index was checked inside before, so it needn't be again.

    Raises:
        DataError: a file is missing, is not this format, has another size than the index says, or its index
            contradicts itself.
    """

    def __init__(self, prefix: str | os.PathLike[str], *, checked: bool = False) -> None:
        self.prefix = os.fspath(prefix)
        self._fd = -1
        for path in (idx_path(prefix), bin_path(prefix)):
            if not path.is_file():
                raise DataError(
                    f"{path}: no such file. A corpus is a pair PREFIX.bin and PREFIX.idx "
                    "(make one with `octant prepare`); give the common prefix."
                )
        self._map_index(idx_path(prefix))
        self._check_sizes()
        if not checked and (problem := next(self.problems(), None)):
            raise DataError(f"{problem}. The index is damaged: prepare the corpus again, or copy it again.")

    def _map_index(self, path: Path) -> None:
        num_bytes = path.stat().st_size
        if num_bytes < HEADER.size:
            raise DataError(
                f"{path}: {num_bytes} bytes, shorter than the {HEADER.size} bytes of an index's header. "
                "The file is damaged or not an index: prepare the corpus again."
            )
        with open(path, "rb") as file:
            self._index_map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        magic, version, code, num_sequences, num_document_marks = HEADER.unpack_from(self._index_map)
        if magic != MAGIC or version != 1:
            raise DataError(
                f"{path}: starts with {magic!r}, version {version}; an index starts with {MAGIC!r}, version 1. "
                "This is not a Megatron index, or it is damaged."
            )
        if code not in DTYPE_OF_CODE:
            raise DataError(
                f"{path}: dtype code {code} holds no token ids; known codes are "
                f"{', '.join(f'{c} ({d.name})' for c, d in DTYPE_OF_CODE.items())}."
            )
        self.dtype = DTYPE_OF_CODE[code]
        self.num_sequences: int = num_sequences
        self.num_documents: int = num_document_marks - 1
        expected = HEADER.size + 12 * num_sequences + 8 * num_document_marks
        if num_bytes != expected or num_document_marks < 1:
            raise DataError(
                f"{path}: {num_bytes} bytes, but {num_sequences} sequences and {num_document_marks} document marks "
                f"take {expected} bytes. The index is truncated or damaged: prepare the corpus again."
            )

        lengths, pointers, marks = (HEADER.size + size * num_sequences for size in (0, 4, 12))
        self._layout = IndexLayout(num_sequences, num_document_marks, lengths, pointers, marks, self.dtype.itemsize)

        def view(dtype: str, count: int, offset: int) -> np.ndarray:
            return np.frombuffer(self._index_map, dtype=dtype, count=count, offset=offset)

        self.sequence_lengths = view("<i4", num_sequences, lengths)
        self.sequence_pointers = view("<i8", num_sequences, pointers)
        self.document_indices = view("<i8", num_document_marks, marks)

    def problems(self) -> Iterator[str]:
        """What is wrong inside the index (see `index_problems`)."""
        return index_problems(idx_path(self.prefix), self._layout)

    def first_divided_document(self) -> int | None:
        """The first document that is not one sequence: none in what Octant writes."""
        return first_divided_document(idx_path(self.prefix), self._layout)

    def _check_sizes(self) -> None:
        """Both ends of the index agree with each other and with `.bin`: the part of verifying that takes no time."""
        index, data = idx_path(self.prefix), bin_path(self.prefix)
        expected_bytes = 0
        if self.num_sequences:
            expected_bytes = int(self.sequence_pointers[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize
        first, last = int(self.document_indices[0]), int(self.document_indices[-1])
        if first != 0 or last != self.num_sequences or (self.num_sequences and int(self.sequence_pointers[0]) != 0):
            raise DataError(
                f"{index}: documents cover sequences {first} to {last} of 0 to {self.num_sequences}. "
                "The index is damaged: prepare the corpus again."
            )
        actual_bytes = data.stat().st_size
        if actual_bytes != expected_bytes:
            raise DataError(
                f"{data}: {actual_bytes} bytes, but its index ends at {expected_bytes} bytes. "
                "One of the two is truncated, damaged, or from another corpus: prepare or copy it again."
            )
        self.num_tokens: int = expected_bytes // self.dtype.itemsize

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens `[start, stop)` of the flat stream over all documents: read-only, in the file's dtype."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise DataError(f"{bin_path(self.prefix)}: tokens {start} to {stop} asked for, it holds {self.num_tokens}.")
        if self._fd < 0:
            self._fd = os.open(bin_path(self.prefix), os.O_RDONLY | os.O_CLOEXEC)
        itemsize = self.dtype.itemsize
        num_bytes = (stop - start) * itemsize
        data = os.pread(self._fd, num_bytes, start * itemsize)
        while len(data) < num_bytes:  # one read returns at most about 2 GiB
            more = os.pread(self._fd, num_bytes - len(data), start * itemsize + len(data))
            if not more:
                raise DataError(
                    f"{bin_path(self.prefix)}: ends {num_bytes - len(data)} bytes before token {stop}; it had "
                    f"{self.num_tokens * itemsize} bytes when opened. The file was cut short meanwhile."
                )
            data += more
        return np.frombuffer(data, self.dtype)

    def document_start(self, document: int) -> int:
        """Flat token position at which a document starts; `num_tokens` for `document == num_documents`."""
        sequence = int(self.document_indices[document])
        if sequence == self.num_sequences:
            return self.num_tokens
        return int(self.sequence_pointers[sequence]) // self.dtype.itemsize

    def document(self, document: int) -> np.ndarray:
        """The token ids of one document."""
        if not 0 <= document < self.num_documents:
            raise DataError(
                f"{idx_path(self.prefix)}: document {document} asked for, it holds {self.num_documents} "
                f"(0 to {self.num_documents - 1})."
            )
        return self.tokens(self.document_start(document), self.document_start(document + 1))

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Positions p, `start < p < stop`, at which a document starts: int64, ascending, found by binary search."""
        itemsize, pointers, marks = self.dtype.itemsize, self.sequence_pointers, self.document_indices
        first = bisect_right(pointers, start * itemsize)
        last = bisect_left(pointers, stop * itemsize, first)
        if first == last:
            return np.zeros(0, np.int64)
        # `bisect` and slices only: the arrays are unaligned (34 + 4·S), and numpy would copy them whole to search them.
        starting = marks[bisect_left(marks, first) : bisect_left(marks, last)] - first
        return np.unique(pointers[first:last][starting] // itemsize)

    def close(self) -> None:
        """Give the file back; reading opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[partial[IndexedDataset], tuple[str]]:
        """Another process opens the files itself."""
        return (partial(IndexedDataset, checked=True), (self.prefix,))


class IndexedWriter:
    """Writes a corpus document by document, with memory that does not grow.

    Tokens go straight to `PREFIX.bin.partial` and lengths to `PREFIX.lengths.partial`; `finalize` builds the
    index from the lengths in chunks, syncs both files and gives them their names, the index last: whoever finds
    an index finds a whole corpus.  Leaving the `with` block by an exception, or `abort`, leaves nothing behind.

    Raises:
        DataError: ids lie outside the dtype (Megatron's builder turns 70000 into 4464 in u16 without a word).
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: npt.DTypeLike) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODE_OF_DTYPE:
            raise DataError(
                f"{self.prefix}: dtype {self.dtype} cannot hold token ids; "
                f"take one of {', '.join(d.name for d in CODE_OF_DTYPE)}."
            )
        self._highest = int(np.iinfo(self.dtype).max)
        self.num_documents = 0
        self.num_tokens = 0
        self._partial_bin, self._partial_lengths, self._partial_idx = (
            Path(f"{self.prefix}.{name}.partial") for name in ("bin", "lengths", "idx")
        )
        self._partial_bin.parent.mkdir(parents=True, exist_ok=True)
        self._bin = open(self._partial_bin, "wb", buffering=1 << 20)
        self._lengths = open(self._partial_lengths, "w+b", buffering=1 << 20)

    def add_document(self, tokens: npt.ArrayLike) -> None:
        """Append one document: a sequence of ids, at most 2^31 - 1 of them."""
        ids = np.asarray(tokens)
        self.add_documents(ids, (ids.size,))

    def add_documents(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike) -> None:
        """Append several documents given back to back, and the number of tokens in each."""
        ids, sizes = np.asarray(tokens).reshape(-1), np.asarray(lengths, np.int64).reshape(-1)
        if ids.size and ids.dtype.kind not in "iu":
            raise DataError(f"{self.prefix}: token ids must be integers, these are {ids.dtype}.")
        if int(sizes.sum()) != ids.size or (sizes.size and (sizes.min() < 0 or sizes.max() > MAX_SEQUENCE_TOKENS)):
            raise DataError(
                f"{self.prefix}: {ids.size} tokens given for documents of {int(sizes.sum())} tokens in all "
                f"(each 0 to {MAX_SEQUENCE_TOKENS})."
            )
        if ids.size and (ids.dtype != self.dtype or self.dtype.kind == "i"):
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high > self._highest:
                raise DataError(
                    f"{bin_path(self.prefix)}: token id {low if low < 0 else high} does not fit {self.dtype.name} "
                    f"(0 to {self._highest}). Write with best_dtype(vocab_size)."
                )
        self._bin.write(ids.astype(self.dtype, copy=False).tobytes())
        self._lengths.write(sizes.astype("<i4").tobytes())
        self.num_documents += sizes.size
        self.num_tokens += ids.size

    def finalize(self) -> None:
        """Write the index and give both files their final names."""
        self._lengths.flush()
        with open(self._partial_idx, "wb", buffering=1 << 20) as index:
            write_header(index, self.dtype, self.num_documents, self.num_documents + 1)
            self._lengths.seek(0)
            shutil.copyfileobj(self._lengths, index, 1 << 20)
            self._write_pointers(index)
            for start in range(0, self.num_documents + 1, CHUNK_ITEMS):
                index.write(np.arange(start, min(start + CHUNK_ITEMS, self.num_documents + 1), dtype="<i8").tobytes())
            sync(index)
        sync(self._bin)
        self._bin.close()
        self._lengths.close()
        os.replace(self._partial_bin, bin_path(self.prefix))
        os.replace(self._partial_idx, idx_path(self.prefix))
        self._partial_lengths.unlink()

    def _write_pointers(self, index: BinaryIO) -> None:
        self._lengths.seek(0)
        position = 0
        while chunk := self._lengths.read(4 * CHUNK_ITEMS):
            ends = position + np.cumsum(np.frombuffer(chunk, "<i4").astype(np.int64)) * self.dtype.itemsize
            index.write(np.concatenate(([position], ends[:-1])).astype("<i8").tobytes())
            position = int(ends[-1])

    def abort(self) -> None:
        """Remove what was written so far."""
        self._bin.close()
        self._lengths.close()
        for path in (self._partial_bin, self._partial_lengths, self._partial_idx):
            path.unlink(missing_ok=True)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
        elif not self._bin.closed:
            self.finalize()


def write_header(index: BinaryIO, dtype: np.dtype, num_sequences: int, num_document_marks: int) -> None:
    index.write(HEADER.pack(MAGIC, 1, CODE_OF_DTYPE[dtype], num_sequences, num_document_marks))


def sync(file: BinaryIO) -> None:
    """Flush a file to the disk itself."""
    file.flush()
    os.fsync(file.fileno())


def merge(prefixes: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> None:
    """Concatenate corpora of one dtype into `out`, sequences and documents kept (Megatron's `add_index`).

    One input is open at a time, however many there are.

    Raises:
        DataError: there is nothing to merge, the dtypes differ, or `out` is one of the inputs.
    """
    if not prefixes:
        raise DataError(f"{os.fspath(out)}: nothing to merge, no input was given.")
    dtype = IndexedDataset(prefixes[0]).dtype
    for part in map(IndexedDataset, prefixes):
        if part.dtype != dtype:
            raise DataError(
                f"{part.prefix} holds {part.dtype.name}, {os.fspath(prefixes[0])} holds {dtype.name}: corpora of two "
                "dtypes cannot be one. Prepare them with the same tokenizer."
            )
        if Path(part.prefix).resolve() == Path(out).resolve():
            raise DataError(f"{part.prefix} is among the inputs: give the merged corpus another name.")
    partial_bin, partial_idx = Path(f"{os.fspath(out)}.bin.partial"), Path(f"{os.fspath(out)}.idx.partial")
    partial_bin.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial_bin, "wb") as data:
            for prefix in prefixes:
                with open(bin_path(prefix), "rb") as source:
                    shutil.copyfileobj(source, data, 1 << 24)
            sync(data)
        with open(partial_idx, "wb", buffering=1 << 20) as index:
            _write_merged_index(index, prefixes, dtype)
            sync(index)
        os.replace(partial_bin, bin_path(out))
        os.replace(partial_idx, idx_path(out))
    finally:
        partial_bin.unlink(missing_ok=True)
        partial_idx.unlink(missing_ok=True)


def _write_merged_index(index: BinaryIO, prefixes: Sequence[str | os.PathLike[str]], dtype: np.dtype) -> None:
    """Lengths as they are; pointers and document marks moved up by what comes before."""
    num_sequences = num_documents = 0
    for part in map(IndexedDataset, prefixes):
        num_sequences += part.num_sequences
        num_documents += part.num_documents
    write_header(index, dtype, num_sequences, num_documents + 1)
    for part in map(IndexedDataset, prefixes):
        _write_shifted(index, part.sequence_lengths, 0)
    num_bytes = 0
    for part in map(IndexedDataset, prefixes):
        _write_shifted(index, part.sequence_pointers, num_bytes)
        num_bytes += part.num_tokens * dtype.itemsize
    num_sequences = 0
    index.write(np.zeros(1, "<i8").tobytes())
    for part in map(IndexedDataset, prefixes):
        _write_shifted(index, part.document_indices[1:], num_sequences)
        num_sequences += part.num_sequences


def _write_shifted(file: BinaryIO, values: np.ndarray, shift: int) -> None:
    for start in range(0, len(values), CHUNK_ITEMS):
        file.write((values[start : start + CHUNK_ITEMS] + values.dtype.type(shift)).tobytes())
