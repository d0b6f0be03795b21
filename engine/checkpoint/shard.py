"""One file of tensors, in the safetensors format: written as a stream, read at any place.

    8 bytes   length n of the header, little-endian
    n bytes   JSON: tensor name → {"dtype", "shape", "data_offsets": [start, stop]}, padded with spaces
    the rest  the tensors' bytes, row-major, without gaps

The header is known before the first tensor is fetched, so a file of any size is written while holding one tensor at a
time.  Wide types come first, which keeps every tensor aligned to its type.  `safetensors.safe_open` reads the result.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from engine.checkpoint.content_hash import TreeHash, chunks_of, hash_segments
from engine.checkpoint.manifest import NAMES, DamagedCheckpoint
from engine.distributed.boxes import Box
from engine.distributed.pieces import Piece, tensor_name
from engine.reading import parse_object, regular_size, require_fetched, shown

DTYPES: dict[str, torch.dtype] = {code: getattr(torch, name) for code, name in NAMES.items()}
CODES = {dtype: code for code, dtype in DTYPES.items()}
ALIGNMENT = 64
HEADER_LIMIT = 100 << 20            # what the safetensors library accepts
MOST_DIMS = 64                      # torch's own limit
SEGMENT_LIMIT = 1024                # IOV_MAX: buffers in one writev


@dataclass(frozen=True)
class Entry:
    """What a file holds or will hold: a box, or the flat range [start, stop) of one; `stop` None: to its end."""

    key: str
    global_shape: tuple[int, ...]
    box: Box
    dtype: torch.dtype
    start: int = 0
    stop: int | None = None

    @property
    def name(self) -> str:
        return tensor_name(self.key, self.box, self.start, self.stop)

    @property
    def size(self) -> tuple[int, ...]:
        """Shape of the tensor in the file."""
        if self.start == 0 and self.stop in (None, self.box.num_elements):
            return self.box.size
        return (self.num_elements,)

    @property
    def num_elements(self) -> int:
        return (self.box.num_elements if self.stop is None else self.stop) - self.start

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


def entry_of(piece: Piece) -> Entry:
    """What a file holds when it holds this piece."""
    return Entry(piece.key, tuple(piece.global_shape), piece.box, piece.tensor.dtype, piece.start, piece.stop)


@dataclass(frozen=True)
class WrittenFile:
    """What the manifest records of a file."""

    name: str
    num_bytes: int
    sha256: str


def file_order(entries: Iterable[Entry]) -> list[Entry]:
    """The order in which a file holds `entries`: wide types first, otherwise as given."""
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)


def encode_header(entries: Sequence[Entry]) -> bytes:
    """Length and header of a file that holds `entries` in this order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        if entry.dtype not in CODES:
            raise TypeError(f"{entry.key}: tensors of type {entry.dtype} cannot be saved; cast it to one of "
                            f"{', '.join(str(d) for d in CODES)}")
        stop = start + entry.num_bytes
        header[entry.name] = {"dtype": CODES[entry.dtype], "shape": list(entry.size), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def file_bytes(entries: Sequence[Entry]) -> int:
    """Size of the file that `write_shard` makes of these entries."""
    return len(encode_header(file_order(entries))) + sum(entry.num_bytes for entry in entries)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order: its own memory if contiguous on the CPU, else a copy."""
    return memory_of(tensor.detach().cpu().contiguous())


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor.  Dimensions of size one may have any stride, hence `as_strided`."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def write_shard(path: Path, entries: Sequence[Entry], fetch: Callable[[Entry], torch.Tensor], pool: Executor,
                on_point: Callable[[str], None]) -> WrittenFile:
    """Writes and fsyncs a new file, hashing what is written from the memory it is written from.

    Args:
        fetch: gives the tensor of an entry; called once per entry, in file order, when its turn comes.
        pool: threads that hash.

    Raises:
        OSError: the disk is full, the path cannot be written.
    """
    ordered = file_order(entries)

    def segments() -> Iterator[memoryview]:
        yield memoryview(encode_header(ordered))
        for entry in ordered:
            tensor = fetch(entry)
            if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.size:
                raise TypeError(f"{entry.name}: planned {entry.dtype} {entry.size}, "
                                f"got {tensor.dtype} {tuple(tensor.shape)}")
            yield tensor_bytes(tensor)

    tree, size = TreeHash(pool), 0
    with open(path, "xb", buffering=0) as file:
        on_point("shard created")
        for chunk in chunks_of(segments()):
            tree.add(partial(hash_segments, chunk))
            _write_all(file.fileno(), chunk)
            _start_writeback(file.fileno(), size)
            size += sum(map(len, chunk))
            on_point("chunk written")
        on_point("shard written")
        os.fsync(file.fileno())
    on_point("shard synced")
    return WrittenFile(path.name, size, tree.hexdigest())


def _write_all(descriptor: int, segments: Sequence[memoryview]) -> None:
    """`writev` until everything is written: it may write less than asked, and takes a limited number of buffers."""
    left = list(segments)
    while left:
        written = os.writev(descriptor, left[:SEGMENT_LIMIT])
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if left and written:
            left[0] = left[0][written:]


def _start_writeback(descriptor: int, start: int) -> None:
    """Lets the disk begin with what was written from `start` on, rather than with everything at the fsync.

    On Linux that is what "don't need" does to dirty pages; elsewhere there is no such call, and the fsync takes longer.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, 0, os.POSIX_FADV_DONTNEED)


class Stored(NamedTuple):
    """A tensor in a file: type, shape, and the position of its first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


class ShardFile:
    """An open file of tensors.  Safe to use from several threads; closes when the last user lets go of it.

    `tensors`: what the header says, by name.  It is believed only where it fits the file: plain sizes, a known type,
    and bytes that begin where those of the tensor before end, up to the end of the file.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            DamagedCheckpoint: missing, or its header is not one that fits its size.
        """
        self.path = path
        try:
            self.num_bytes = regular_size(path)
            self._file: BinaryIO = open(path, "rb", buffering=0)
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{path}: the file is missing") from None
        except ValueError as error:
            raise DamagedCheckpoint(f"{path}: not a whole safetensors file: {error}") from None
        self._map: mmap.mmap | None = None
        try:
            self.tensors = self._read_header()
        except ValueError as error:
            raise DamagedCheckpoint(f"{path}: not a whole safetensors file: {error}") from None

    def _read_header(self) -> dict[str, Stored]:
        descriptor = self._file.fileno()
        require_fetched(os.pread(descriptor, 1024, 0))
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if not 2 <= length <= min(HEADER_LIMIT, self.num_bytes - 8):
            raise ValueError(f"a header of {length:,} bytes in a file of {self.num_bytes:,}")
        header = parse_object(os.pread(descriptor, length, 8))
        about = header.pop("__metadata__", {})
        if not isinstance(about, dict) or not all(isinstance(text, str) for text in about.values()):
            raise ValueError(f"__metadata__ is {shown(about)}, not texts by name")
        base = 8 + length
        tensors = {name: _stored(name, info, base) for name, info in header.items()}
        stop = base
        for name, stored in sorted(tensors.items(), key=lambda item: (item[1].start, prod(item[1].shape))):
            if stored.start != stop:
                raise ValueError(f"{shown(name)} begins at byte {stored.start:,}; the tensor before ends at {stop:,}")
            stop += prod(stored.shape) * stored.dtype.itemsize
        if stop != self.num_bytes:
            raise ValueError(f"its tensors end at byte {stop:,}, the file at {self.num_bytes:,}")
        return tensors

    def locate(self, entry: Entry) -> int:
        """Position in the file of the first byte of `entry`.

        Raises:
            DamagedCheckpoint: it is not there, or is something else than the manifest says.
        """
        found = self.tensors.get(entry.name)
        if found is None:
            raise DamagedCheckpoint(f"{self.path}: holds no {entry.name}")
        if found.dtype != entry.dtype or found.shape != entry.size:
            raise DamagedCheckpoint(f"{self.path}: {entry.name} is {found.dtype} {found.shape}, not {entry.dtype} "
                                    f"{entry.size}")
        return found.start

    def read_into(self, memory: memoryview, start: int) -> None:
        """Fills `memory` with the bytes from `start` on."""
        done = 0
        while done < len(memory):
            got = os.preadv(self._file.fileno(), [memory[done:]], start + done)
            if got == 0:
                raise DamagedCheckpoint(f"{self.path}: ends at byte {start + done:,}")
            done += got

    def array(self, entry: Entry) -> np.ndarray:
        """The tensor of `entry`, memory-mapped, as integers of its width (NumPy has no bfloat16)."""
        start = self.locate(entry)
        if self._map is None:
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        flat = np.frombuffer(self._map, integer_type(entry.dtype), entry.num_elements, start)
        return flat.reshape(entry.size)


def _stored(name: str, info: Any, base: int) -> Stored:
    """A tensor as the header describes it; its bytes are counted from `base`.

    Raises:
        ValueError: the description makes no sense.
    """
    described = info if isinstance(info, dict) and len(info) == 3 else {}
    kind, shape, offsets = described.get("dtype"), _sizes(described.get("shape")), _sizes(described.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise ValueError(f"{shown(name)} is described by {shown(info)}")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(f"{shown(name)} is of the type {shown(kind)}; Octant reads {', '.join(DTYPES)}")
    dtype = DTYPES[kind]
    if offsets[1] - offsets[0] != prod(shape) * dtype.itemsize:
        raise ValueError(f"{shown(name)} claims bytes {offsets[0]:,} to {offsets[1]:,}, which is not its size")
    return Stored(dtype, shape, base + offsets[0])


def _sizes(value: Any) -> tuple[int, ...] | None:
    """A list of plain sizes, as a tuple."""
    plain = (isinstance(value, list) and len(value) <= MOST_DIMS
             and all(type(size) is int and 0 <= size < 1 << 62 for size in value))
    return tuple(value) if plain else None


def integer_type(dtype: torch.dtype) -> str:
    """NumPy's unsigned integer of the width of `dtype`, to move bits that NumPy has no type for."""
    return f"u{dtype.itemsize}"
