"""Reading: any piece of any tensor, whatever pieces it was saved in.

The manifest's ledger says which stored tiles a wanted box overlaps, and where (`engine.distributed.ledger`).  A stretch
that is contiguous on both sides goes straight from the file into the tensor's memory; anything else is copied out of a
memory map, so only the pages that hold wanted bytes are read.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.checkpoint.content_hash import hash_file
from engine.checkpoint.manifest import MANIFEST_NAME, DamagedCheckpoint, StoredTensor, decode_manifest
from engine.checkpoint.shard import DTYPES, Entry, ShardFile, integer_type, memory_of
from engine.distributed.boxes import Box, contiguous_in, flat_position, inside, strides_of
from engine.distributed.ledger import cover
from engine.distributed.pieces import Piece
from engine.errors import CheckpointError
from engine.reading import read_bytes, regular_size

READ_BYTES = 16 << 20           # one thread's share of a large contiguous read
OPEN_FILES = 64
JOBS_AHEAD = 128


@dataclass(frozen=True)
class Problem:
    """Something wrong with a checkpoint."""

    file: str
    what: str


@dataclass(frozen=True)
class _Copy:
    """`region` of what a file holds goes to the same region of a piece."""

    file: int
    entry: Entry
    region: Box
    target: Piece


class CheckpointReader:
    """A committed checkpoint, open for reading.

    Attributes:
        content: hash of its manifest, which vouches for every byte of it.

    Args:
        path: the checkpoint's directory.
        threads: for reading and hashing; None: up to 4.
        manifest: the bytes of its manifest, where somebody has read them already.
    """

    def __init__(self, path: Path, threads: int | None = None, manifest: bytes | None = None) -> None:
        """
        Raises:
            DamagedCheckpoint: the manifest is missing or not what was written.
            CheckpointError: there is no such directory, or its format is of another version.
        """
        self.path = Path(path)
        data = read_manifest(self.path) if manifest is None else manifest
        self.content = hashlib.sha256(data).hexdigest()
        self.manifest = decode_manifest(data, self.path / MANIFEST_NAME)
        self._pool: Executor = ThreadPoolExecutor(threads or min(4, os.cpu_count() or 1),
                                                  thread_name_prefix="checkpoint-read")
        self._open: OrderedDict[int, ShardFile] = OrderedDict()

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def metadata(self) -> dict[str, Any]:
        return self.manifest.metadata

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids at which the model ends a text where its tokenizer's end of document is not the only one."""
        ids = self.metadata.get("end_ids")
        return tuple(token_id for token_id in ids if type(token_id) is int) if isinstance(ids, list) else ()

    def keys(self) -> list[str]:
        return list(self.manifest.tensors)

    def __contains__(self, key: str) -> bool:
        return key in self.manifest.tensors

    def global_shape(self, key: str) -> tuple[int, ...]:
        return self._stored(key).shape

    def dtype(self, key: str) -> torch.dtype:
        return DTYPES[self._stored(key).dtype]

    def boxes(self, key: str) -> tuple[Box, ...]:
        """The boxes in which the tensor is stored; those of a tile that is a flat range one by one."""
        self._stored(key)
        ledger = self.manifest.ledger
        return tuple(box for tile in ledger.tiles_of(key) for box in ledger.boxes(tile))

    def read(self, key: str, box: Box | None = None) -> torch.Tensor:
        """A new CPU tensor with the values of `box`, or of the whole tensor.

        Raises:
            CheckpointError: no such tensor, the box leaves it, or a part of the box is stored nowhere.
        """
        shape = self.global_shape(key)
        box = Box.whole(shape) if box is None else box
        if not inside(box, shape):
            raise CheckpointError(f"{key} has the shape {list(shape)}; {box} leaves it")
        tensor = torch.empty(box.size, dtype=self.dtype(key))
        self._run(self._cover(Piece(key, shape, box, tensor)))
        return tensor

    def load_into(self, pieces: Sequence[Piece], strict: bool = True, convert: bool = False) -> list[str]:
        """Fills the tensors of `pieces`, in place.

        Args:
            strict: a piece whose key the checkpoint does not have is an error; otherwise it is left as it is.
            convert: allow another floating-point type than the stored one (values are rounded).

        Returns:
            The keys that were left as they are.

        Raises:
            CheckpointError: a missing key, another global shape, a region stored nowhere, or another type.
                The tensors may have been filled in part.
        """
        missing = sorted({piece.key for piece in pieces if piece.key not in self})
        if missing and strict:
            self._stored(missing[0])
        direct: list[_Copy] = []
        for piece in pieces:
            if piece.key not in self:
                continue
            self._check(piece, convert)
            if piece.tensor.dtype == self.dtype(piece.key) and piece.tensor.device.type == "cpu":
                direct += self._cover(piece)
            else:
                values = torch.empty(piece.tensor.shape, dtype=self.dtype(piece.key))
                self._run(self._cover(replace(piece, tensor=values)))
                piece.tensor.detach().copy_(values)
        self._run(direct)
        return missing

    def verify(self, share: tuple[int, int] = (0, 1), content: bool = True,
               progress: Callable[[int], None] | None = None, files: Sequence[int] | None = None) -> list[Problem]:
        """Compares size and hash of every file with the manifest, and looks for every tensor.

        Args:
            share: (rank, world size): only every world size-th file, beginning with rank.
            content: read and hash the files; otherwise look at their sizes only.
            progress: told the bytes read, as they are.
            files: only those of these numbers; None: all.
        """
        problems = []
        for index in (range(len(self.manifest.files)) if files is None else files)[share[0] :: share[1]]:
            stored = self.manifest.files[index]
            try:
                what = self._examine(index, content, progress)
            except (OSError, ValueError, DamagedCheckpoint) as error:
                what = str(error)
            if what is not None:
                problems.append(Problem(stored.name, what))
        return problems

    def files_of(self, pieces: Sequence[Piece]) -> list[int]:
        """The numbers of the files that hold these pieces.

        Raises:
            CheckpointError: a part of one is stored nowhere.
        """
        return sorted({copy.file for piece in pieces if piece.key in self for copy in self._cover(piece)})

    def _examine(self, index: int, content: bool, progress: Callable[[int], None] | None) -> str | None:
        stored = self.manifest.files[index]
        path = self.path / stored.name
        if not path.exists():
            return "missing"
        size = regular_size(path)
        if size != stored.num_bytes:
            return f"{size:,} bytes, {stored.num_bytes:,} were written"
        if not content:
            return None
        if hash_file(path, self._pool, progress) != stored.sha256:
            return "the content has changed since it was written"
        file = ShardFile(path)
        order, edges = self._tiles_by_file
        for tile in order[edges[index] : edges[index + 1]]:
            file.locate(self._entry(int(tile)))
        return None

    @cached_property
    def _tiles_by_file(self) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the tiles in the order of their files, and where each file's begin."""
        files = self.manifest.ledger.holders
        order = np.argsort(files, kind="stable")
        return order, np.searchsorted(files[order], np.arange(len(self.manifest.files) + 1))

    def _entry(self, tile: int) -> Entry:
        """What the file of a tile holds there."""
        ledger = self.manifest.ledger
        block = ledger.blocks[ledger.block[tile]]
        return Entry(block.key, block.shape, block.box, getattr(torch, block.dtype), int(ledger.start[tile]),
                     int(ledger.stop[tile]))

    def _stored(self, key: str) -> StoredTensor:
        if key not in self.manifest.tensors:
            near = difflib.get_close_matches(key, self.manifest.tensors, 1)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise CheckpointError(f"{self.path} holds no tensor {key}{hint}")
        return self.manifest.tensors[key]

    def _check(self, piece: Piece, convert: bool) -> None:
        shape, dtype = self.global_shape(piece.key), self.dtype(piece.key)
        if shape != tuple(piece.global_shape):
            raise CheckpointError(f"{piece.key} is {list(shape)} in {self.path}, {list(piece.global_shape)} here: "
                                  "another model shape")
        both_float = piece.tensor.is_floating_point() and dtype.is_floating_point
        if piece.tensor.dtype != dtype and not (convert and both_float):
            raise CheckpointError(f"{piece.key} is {dtype} in {self.path}, {piece.tensor.dtype} here; "
                                  "a conversion would change values and was not asked for: leave precision.masters as "
                                  "it was, or begin another run with these weights (checkpoint.load)")

    def _cover(self, piece: Piece) -> list[_Copy]:
        """The copies that fill a piece."""
        ledger = self.manifest.ledger
        copies: list[_Copy] = []
        for box, _ in piece.parts():
            found, left = cover(ledger, piece.key, box)
            if left:
                raise CheckpointError(f"{self.path}: {sum(part.num_elements for part in left):,} elements of "
                                      f"{piece.key} are stored nowhere, such as {left[0]}")
            copies += [_Copy(int(ledger.holders[tile]), self._entry(tile), region, piece) for tile, region in found]
        return copies

    def _run(self, copies: list[_Copy]) -> None:
        """Carries the copies out, file by file, spread over threads; few at a time, as each keeps a file open."""
        running: deque[Future[None]] = deque()
        for copy in sorted(copies, key=lambda copy: copy.file):
            for job in self._jobs(copy):
                if len(running) >= JOBS_AHEAD:
                    running.popleft().result()
                running.append(self._pool.submit(job))
        for future in running:
            future.result()

    def _jobs(self, copy: _Copy) -> Iterator[Callable[[], None]]:
        file, entry = self._file(copy.file), copy.entry
        view = copy.target.view(copy.region).detach()
        if not (view.is_contiguous() and contiguous_in(copy.region, entry.box)):
            yield partial(_copy_strided, file, copy, view)
            return
        memory = memory_of(view)
        start = file.locate(entry) + (flat_position(copy.region, entry.box) - entry.start) * entry.dtype.itemsize
        for done in range(0, len(memory), READ_BYTES):
            yield partial(file.read_into, memory[done:done + READ_BYTES], start + done)

    def _file(self, index: int) -> ShardFile:
        """Keeps the files used last open; a job's file stays open until the job has gone."""
        if index not in self._open:
            self._open[index] = ShardFile(self.path / self.manifest.files[index].name)
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(index)
        return self._open[index]


def _copy_strided(file: ShardFile, copy: _Copy, view: torch.Tensor) -> None:
    """Bits move as integers of the same width: NumPy maps read-only memory, and has no bfloat16."""
    entry, width = copy.entry, copy.entry.dtype.itemsize
    flat = file.array(entry).reshape(-1)[flat_position(copy.region, entry.box) - entry.start :]
    strides = tuple(step * width for step in strides_of(entry.box.size))
    source = np.lib.stride_tricks.as_strided(flat, copy.region.size, strides, writeable=False)
    same_width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    np.copyto(view.view(same_width).numpy().view(integer_type(entry.dtype)), source)


def read_manifest(path: Path) -> bytes:
    """The bytes of a checkpoint's manifest, as they are.

    Raises:
        DamagedCheckpoint: it is missing, or no file that a manifest could be in.
        CheckpointError: there is no such directory, or the file may not be read.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        return read_bytes(path / MANIFEST_NAME)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path}: {MANIFEST_NAME} is missing") from None
    except ValueError as error:
        raise DamagedCheckpoint(f"{path / MANIFEST_NAME}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path / MANIFEST_NAME}: {error.strerror or error}") from None
