"""megatron-core's `torch_dist`, which is torch's distributed checkpoint (DCP) with two files more.

    __0_0.distcp …    tensors one after the other, each a small archive of `torch.save`
    .metadata         a pickle: every tensor's shape and type, its chunks, and where each chunk lies
    metadata.json     names the format
    common.pt         what is not a tensor (iteration, arguments)

Both directions stream: one chunk in memory at a time.  Neither needs megatron-core, nor a process group.

`.metadata` is a pickle, and a pickle may run code.  So it is read by an unpickler that knows the handful of classes
such a file consists of, all of them plain values, and puts an inert bag of attributes in the place of everything else.
Chunks are read by torch's reader of tensors alone (`archives`).  Paths that leave the folder are refused, and so are
chunks that leave their tensor or their file.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

from checkpoints_tools.archives import is_plain_tensor, load_archive
from checkpoints_tools.output import divide
from checkpoints_tools.recognise import TORCH_DIST, require_format
from engine.checkpoint.manifest import DamagedCheckpoint
from engine.checkpoint.shard import Entry
from engine.distributed.boxes import Box, subtract
from engine.distributed.pieces import inside
from engine.errors import CheckpointError
from engine.reading import read_bytes, read_object, regular_size, shown

METADATA, FORMAT_FILE, COMMON = ".metadata", "metadata.json", "common.pt"
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
          "common_backend_version": 1}
OBJECTS = "__0_objects.distcp"
FILE_BYTES = 5 * 10**9
MOST_METADATA = 4 << 30                 # a model of 10,000 tensors in 2,048 chunks each has 1 GB
VALUE_CLASSES = {(cls.__module__, cls.__qualname__): cls for cls in (
    metadata.Metadata, metadata.TensorStorageMetadata, metadata.BytesStorageMetadata, metadata.ChunkStorageMetadata,
    metadata.TensorProperties, metadata._MEM_FORMAT_ENCODING, metadata.MetadataIndex, metadata.StorageMeta,
    filesystem._StorageInfo, torch.Size)}


@dataclass(frozen=True)
class Chunk:
    """A stored box of a tensor: `length` bytes from `start` on in `path`."""

    box: Box
    path: Path
    start: int
    length: int


@dataclass(frozen=True)
class Stored:
    """A tensor of the checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


class TorchDistReader:
    """Any box of any tensor of a `torch_dist` folder.

    Raises:
        CheckpointError: the folder is of another format, or its metadata makes no sense.
    """

    def __init__(self, folder: Path) -> None:
        require_format(folder, TORCH_DIST)
        self.folder = folder
        stated = read_object(folder / FORMAT_FILE, "the format of a checkpoint of megatron-core", CheckpointError)
        if stated.get("sharded_backend") != FORMAT["sharded_backend"]:
            raise CheckpointError(f"{folder} is in the format {shown(stated.get('sharded_backend'))}, not torch_dist")
        try:
            found = _unpickle(read_bytes(folder / METADATA, MOST_METADATA))
            self.tensors = {key: _stored(folder, key, info, found.storage_data)
                            for key, info in found.state_dict_metadata.items()
                            if isinstance(info, metadata.TensorStorageMetadata)}
        except Exception as error:      # a pickle can hold, and lack, anything; MemoryError included
            raise DamagedCheckpoint(f"{folder / METADATA} cannot be read: {type(error).__name__}: {error}") from None

    def read(self, key: str, box: Box) -> torch.Tensor:
        """A new CPU tensor with the values of `box`.

        Raises:
            CheckpointError: a part of the box is stored nowhere, or a file is missing or damaged.
        """
        stored = self.tensors[key]
        exact = next((chunk for chunk in stored.chunks if chunk.box == box), None)
        if exact is not None:                               # no copy
            return _load(exact, key, stored.dtype)
        copies, left = [], [box]
        for chunk in stored.chunks:
            regions = [(part, region) for part in left if (region := part.intersect(chunk.box)) is not None]
            copies += [(chunk, region) for _, region in regions]
            left = [part for part in left if all(part is not taken for taken, _ in regions)]
            left += [rest for part, region in regions for rest in subtract(part, region)]
        if missing := sum(part.num_elements for part in left):
            raise DamagedCheckpoint(f"{self.folder}: {missing:,} elements of {key} are stored nowhere")
        tensor = torch.empty(box.size, dtype=stored.dtype)
        for chunk, region in copies:
            tensor[region.within(box)] = _load(chunk, key, stored.dtype)[region.within(chunk.box)]
        return tensor


def _unpickle(data: bytes) -> Any:
    """The object in a pickle of plain values.

    Raises:
        ValueError: it claims more bytes than there are, or numbers the values it wants to come back to so high that the
            unpickler, which keeps a list of them, would fill the memory.
    """
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and isinstance(argument, int) and argument > number:
            raise ValueError(f"its value {number:,} is numbered {argument:,}")
    return _Unpickler(io.BytesIO(data)).load()


class _Inert:
    """Stands for an object of any other class: keeps its attributes, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})

    def __setitem__(self, key: Any, value: Any) -> None: ...
    def append(self, value: Any) -> None: ...


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype | torch.layout):
            return found
        return VALUE_CLASSES.get((module, name), _Inert)


class _Window(io.RawIOBase):
    """The bytes of a chunk as a file, so that torch reads them straight into the tensor."""

    def __init__(self, file: io.FileIO, chunk: Chunk) -> None:
        self._file, self._start, self._length, self._at = file, chunk.start, chunk.length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        done = self._file.readinto(memoryview(buffer)[:max(0, self._length - self._at)]) or 0
        self._at += done
        return done


def _stored(folder: Path, key: str, info: metadata.TensorStorageMetadata, places: dict[Any, Any]) -> Stored:
    """A tensor as the metadata describes it.

    Raises:
        ValueError: what is said of it contradicts itself, or its files.
    """
    shape, dtype = tuple(info.size), info.properties.dtype
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{key} is of the type {shown(dtype)}")
    chunks = []
    for chunk in info.chunks:
        box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
        if not all(type(size) is int for size in shape + box.offset + box.size) or not inside(box, shape):
            raise ValueError(f"a chunk of {key}, {shown(shape)}, lies at {shown(box.offset)} and is {shown(box.size)}")
        place = places[metadata.MetadataIndex(key, box.offset)]
        path = _inside(folder, key, place)
        if box.num_elements * dtype.itemsize > place.length:
            raise ValueError(f"a chunk of {key} is {shown(box.size)} of {dtype} in {place.length:,} bytes")
        chunks.append(Chunk(box, path, place.offset, place.length))
    return Stored(shape, dtype, tuple(chunks))


def _inside(folder: Path, key: str, place: Any) -> Path:
    """The file of a chunk; the chunk lies within it."""
    name = place.relative_path
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
        raise ValueError(f"{key} lies in {shown(name)}, which is not a file of this folder")
    if getattr(place, "transform_descriptors", None):
        raise ValueError(f"{key} is stored transformed ({shown(place.transform_descriptors)})")
    if not all(type(number) is int and number >= 0 for number in (place.offset, place.length)):
        raise ValueError(f"{key} lies at byte {shown(place.offset)} of {name}, {shown(place.length)} bytes long")
    return folder / name


def _load(chunk: Chunk, key: str, dtype: torch.dtype) -> torch.Tensor:
    try:
        size = regular_size(chunk.path)
        if chunk.start + chunk.length > size:
            raise ValueError(f"the file ends at byte {size:,}")
        with open(chunk.path, "rb", buffering=0) as file:
            window = io.BufferedReader(_Window(file, chunk))
            tensor = load_archive(window, window)
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{chunk.path}: {key} at byte {chunk.start:,} cannot be read: {error}") from None
    if not is_plain_tensor(tensor) or tuple(tensor.shape) != chunk.box.size or tensor.dtype != dtype:
        raise DamagedCheckpoint(f"{chunk.path}: {key} at byte {chunk.start:,} is not what {METADATA} says")
    loaded: torch.Tensor = tensor.detach()
    return loaded


def write_torch_dist(folder: Path, entries: Sequence[Entry], fetch: Callable[[Entry], torch.Tensor],
                     empty: Sequence[str], common: dict[str, Any], file_bytes: int = FILE_BYTES) -> None:
    """Writes a `torch_dist` folder of one rank.

    Args:
        entries: the chunks, in the order in which they are fetched and written.
        fetch: gives the tensor of an entry, of shape `entry.box.size`.
        empty: names of objects that a loader asks for and that have nothing in them.
        common: plain values.
        file_bytes: no file is much larger, unless it holds a single chunk.

    Raises:
        OSError: the disk is full, the folder cannot be written.
    """
    folder.mkdir(parents=True)
    places: dict[metadata.MetadataIndex, filesystem._StorageInfo] = {}
    for number, group in enumerate(divide(entries, lambda entry: entry.num_bytes, file_bytes)):
        name = f"__0_{number}.distcp"
        with open(folder / name, "wb") as file:
            for entry in group:
                start = file.tell()
                _save(fetch(entry), file)
                places[metadata.MetadataIndex(entry.key, entry.box.offset)] = filesystem._StorageInfo(
                    name, start, file.tell() - start)
    with open(folder / OBJECTS, "wb") as file:
        for name in empty:
            start = file.tell()
            _save([None], file)
            places[metadata.MetadataIndex(name)] = filesystem._StorageInfo(OBJECTS, start, file.tell() - start)
    (folder / METADATA).write_bytes(pickle.dumps(_describe(entries, empty, places)))
    (folder / FORMAT_FILE).write_text(json.dumps(FORMAT), encoding="utf-8")
    with open(folder / COMMON, "wb") as file:
        _save(common, file)


def _save(value: Any, file: io.BufferedWriter) -> None:
    """On a full disk torch raises a RuntimeError about a position, or swallows what the file said."""
    try:
        torch.save(value, file)
        file.flush()
    except RuntimeError as error:
        raise OSError(f"{file.name}: torch.save failed, as it does on a full disk ({error})") from error


def _describe(entries: Sequence[Entry], empty: Sequence[str],
              places: dict[metadata.MetadataIndex, filesystem._StorageInfo]) -> metadata.Metadata:
    tensors: dict[str, metadata.TensorStorageMetadata] = {}
    for entry in entries:
        stored = tensors.setdefault(entry.key, metadata.TensorStorageMetadata(
            metadata.TensorProperties(dtype=entry.dtype), torch.Size(entry.global_shape), []))
        stored.chunks.append(metadata.ChunkStorageMetadata(torch.Size(entry.box.offset), torch.Size(entry.box.size)))
    objects = {name: metadata.BytesStorageMetadata() for name in empty}
    return metadata.Metadata({**tensors, **objects}, storage_data=places)
