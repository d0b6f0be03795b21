"""Reading: any box of any tensor, whatever boxes it was saved in.

A wanted box is covered by intersecting it with the stored boxes; what the first one gives is taken off, the rest is
looked for in the next, until nothing is left.  A stretch that is contiguous on both sides goes straight from the file
into the tensor's memory; anything else is copied out of a memory map, so only the pages that hold wanted bytes are
read.
"""

from __future__ import annotations

import difflib
import os
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.checkpoint.content_hash import hash_file
from engine.checkpoint.manifest import MANIFEST_NAME, DamagedCheckpoint, StoredTensor, decode_manifest
from engine.checkpoint.shard import DTYPES, Entry, ShardFile, integer_type, memory_of
from engine.distributed.boxes import Box
from engine.distributed.pieces import Piece, inside
from engine.errors import CheckpointError

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
    """`region` of a stored box goes to the same region of a tensor that holds `target_box`."""

    file: int
    entry: Entry
    region: Box
    target: torch.Tensor
    target_box: Box


class CheckpointReader:
    """A committed checkpoint, open for reading.

    Args:
        path: the checkpoint's directory.
        threads: for reading and hashing; None: up to 4.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        """
        Raises:
            DamagedCheckpoint: the manifest is missing or not what was written.
            CheckpointError: there is no such directory, or its format is of another version.
        """
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: no such checkpoint")
        try:
            data = (self.path / MANIFEST_NAME).read_bytes()
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{self.path}: {MANIFEST_NAME} is missing") from None
        self.manifest = decode_manifest(data, self.path / MANIFEST_NAME)
        for key, tensor in self.manifest.tensors.items():
            if tensor.dtype not in DTYPES:
                raise DamagedCheckpoint(f"{self.path}: {key} has the unknown type {tensor.dtype}")
        self._pool: Executor = ThreadPoolExecutor(threads or min(4, os.cpu_count() or 1),
                                                  thread_name_prefix="checkpoint-read")
        self._open: OrderedDict[int, ShardFile] = OrderedDict()
        self._corners: dict[str, tuple[np.ndarray, np.ndarray]] = {}

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
        """The boxes in which the tensor is stored."""
        return self._stored(key).boxes

    def read(self, key: str, box: Box | None = None) -> torch.Tensor:
        """A new CPU tensor with the values of `box`, or of the whole tensor.

        Raises:
            CheckpointError: no such tensor, the box leaves it, or a part of the box is stored nowhere.
        """
        shape = self.global_shape(key)
        box = Box.whole(shape) if box is None else box
        tensor = torch.empty(box.size, dtype=self.dtype(key))
        self._run(self._cover(key, box, tensor))
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
                direct += self._cover(piece.key, piece.box, piece.tensor)
            else:
                piece.tensor.detach().copy_(self.read(piece.key, piece.box))
        self._run(direct)
        return missing

    def verify(self, share: tuple[int, int] = (0, 1), content: bool = True,
               progress: Callable[[int], None] | None = None) -> list[Problem]:
        """Compares size and hash of every file with the manifest, and looks for every tensor.

        Args:
            share: (rank, world size): only every world size-th file, beginning with rank.
            content: read and hash the files; otherwise look at their sizes only.
            progress: told the bytes read, as they are.
        """
        problems = []
        for index in range(share[0], len(self.manifest.files), share[1]):
            stored = self.manifest.files[index]
            try:
                what = self._examine(index, content, progress)
            except (OSError, DamagedCheckpoint) as error:
                what = str(error)
            if what is not None:
                problems.append(Problem(stored.name, what))
        return problems

    def _examine(self, index: int, content: bool, progress: Callable[[int], None] | None) -> str | None:
        stored = self.manifest.files[index]
        path = self.path / stored.name
        if not path.exists():
            return "missing"
        size = path.stat().st_size
        if size != stored.num_bytes:
            return f"{size:,} bytes, {stored.num_bytes:,} were written"
        if not content:
            return None
        if hash_file(path, self._pool, progress) != stored.sha256:
            return "the content has changed since it was written"
        file = ShardFile(path)
        for entry in self._held[index]:
            file.locate(entry)
        return None

    @cached_property
    def _held(self) -> dict[int, list[Entry]]:
        """What the manifest says each file holds."""
        held: dict[int, list[Entry]] = defaultdict(list)
        for key, tensor in self.manifest.tensors.items():
            for box, file in zip(tensor.boxes, tensor.files, strict=True):
                held[file].append(Entry(key, tensor.shape, box, DTYPES[tensor.dtype]))
        return held

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
                                  "a conversion would change values and was not asked for")

    def _cover(self, key: str, box: Box, target: torch.Tensor) -> list[_Copy]:
        """The copies that fill `target`, which holds `box`: boxes ∩ boxes."""
        stored = self._stored(key)
        if not inside(box, stored.shape):
            raise CheckpointError(f"{key} has the shape {list(stored.shape)}; {box} leaves it")
        copies: list[_Copy] = []
        left = [box] if box.num_elements else []
        for index in self._touching(key, stored, box):
            source, still_left = stored.boxes[index], []
            for part in left:
                region = part.intersect(source)
                if region is None:
                    still_left.append(part)
                    continue
                entry = Entry(key, stored.shape, source, DTYPES[stored.dtype])
                copies.append(_Copy(stored.files[index], entry, region, target, box))
                still_left += subtract(part, region)
            left = still_left
        if left:
            raise CheckpointError(f"{self.path}: {sum(part.num_elements for part in left):,} elements of {key} "
                                  f"are stored nowhere, such as {left[0]}")
        return copies

    def _touching(self, key: str, stored: StoredTensor, box: Box) -> Iterable[int]:
        """Indices of the stored boxes that overlap `box`; a tensor may be stored in thousands."""
        if key not in self._corners:
            shape = (len(stored.boxes), len(stored.shape))
            offsets = np.array([b.offset for b in stored.boxes], np.int64).reshape(shape)
            self._corners[key] = offsets, offsets + np.array([b.size for b in stored.boxes], np.int64).reshape(shape)
        starts, stops = self._corners[key]
        box_start = np.array(box.offset, np.int64)
        overlap = (np.maximum(starts, box_start) < np.minimum(stops, box_start + np.array(box.size, np.int64))).all(1)
        return (int(index) for index in np.flatnonzero(overlap))

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
        file = self._file(copy.file)
        view = copy.target.detach()[copy.region.within(copy.target_box)]
        if not (view.is_contiguous() and contiguous_in(copy.region, copy.entry.box)):
            yield partial(_copy_strided, file, copy, view)
            return
        memory = memory_of(view)
        start = file.locate(copy.entry) + flat_position(copy.region, copy.entry.box) * copy.entry.dtype.itemsize
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
    source = file.array(copy.entry)[copy.region.within(copy.entry.box)]
    same_width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[copy.entry.dtype.itemsize]
    np.copyto(view.view(same_width).numpy().view(integer_type(copy.entry.dtype)), source)


def contiguous_in(region: Box, outer: Box) -> bool:
    """Is `region` one stretch of the row-major tensor that holds `outer`?

    So it is if it takes single indices of the first dimensions, a range of the next, and all of the others.
    """
    widest = next((d for d, size in enumerate(region.size) if size > 1), len(region.size))
    return region.size[widest + 1:] == outer.size[widest + 1:]


def flat_position(region: Box, outer: Box) -> int:
    """Position of the first element of `region` in the row-major tensor that holds `outer`."""
    return sum((r - o) * prod(outer.size[d + 1:])
               for d, (r, o) in enumerate(zip(region.offset, outer.offset, strict=True)))


def subtract(box: Box, hole: Box) -> list[Box]:
    """What remains of `box` without `hole`, which lies inside it: disjoint boxes, at most two per dimension."""
    parts: list[Box] = []
    for dim in range(len(box.size)):
        before = hole.offset[dim] - box.offset[dim]
        after = box.size[dim] - before - hole.size[dim]
        if before:
            parts.append(box.narrow(dim, 0, before))
        if after:
            parts.append(box.narrow(dim, before + hole.size[dim], after))
        box = box.narrow(dim, before, hole.size[dim])
    return parts
