"""Weights in a Hugging Face folder: one `model.safetensors`, or several with an index of which tensor is where.

Tensors are read and written one at a time, with `read` and `write` rather than memory maps, so that what a process
holds is one tensor and not whatever the kernel keeps of a file.  Writing is the checkpoint engine's own writer.

`pytorch_model.bin` is a pickle.  It is read only where that was asked for, and then by torch's reader of tensors alone
(`weights_only`), which runs no code of the file.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open

from checkpoints_tools.output import divide
from engine.checkpoint.manifest import DamagedCheckpoint
from engine.checkpoint.shard import DTYPES, Entry, ShardFile, write_shard
from engine.distributed.boxes import Box
from engine.errors import CheckpointError

SHARD_BYTES = 5 * 10**9                 # Hugging Face's own default
HASH_THREADS = 2
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Whole(Entry):
    """A whole tensor under its plain name."""

    @property
    def name(self) -> str:
        return self.key

    @staticmethod
    def of(name: str, shape: Sequence[int], dtype: torch.dtype) -> Whole:
        return Whole(name, tuple(shape), Box.whole(tuple(shape)), dtype)


class _WeightFile(Protocol):
    """A file of named tensors."""

    tensors: dict[str, tuple[int, ...]]         # name → shape

    def read(self, name: str) -> torch.Tensor: ...


class _SafetensorsFile:
    def __init__(self, path: Path) -> None:
        self._file = ShardFile(path)                # refuses what is not whole
        with safe_open(path, "pt") as header:
            slices = {name: header.get_slice(name) for name in header.keys()}
            self._entries = {name: Whole.of(name, part.get_shape(), DTYPES[part.get_dtype()])
                             for name, part in slices.items()}
        self.tensors = {name: entry.global_shape for name, entry in self._entries.items()}

    def read(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        tensor = torch.empty(entry.global_shape, dtype=entry.dtype)
        self._file.read_into(tensor.reshape(-1).view(torch.uint8).numpy().data, self._file.locate(entry))
        return tensor


class _PickleFile:
    def __init__(self, path: Path) -> None:
        try:
            self._tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise CheckpointError(f"{path} is not a file of tensors alone that torch can map: {error}") from None
        self.tensors = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._tensors[name]
        return tensor


class HFWeights:
    """The weights of a Hugging Face folder.

    Args:
        allow_pickle: read `.bin` files where there are no safetensors.

    Raises:
        CheckpointError: there are no weights, a file is missing or damaged, or only pickles are there.
    """

    def __init__(self, folder: Path, allow_pickle: bool = False) -> None:
        self.folder = folder
        self._where: dict[str, _WeightFile] = {}
        for path in _weight_files(folder, allow_pickle):
            file: _WeightFile = _SafetensorsFile(path) if path.suffix == ".safetensors" else _PickleFile(path)
            self._where.update(dict.fromkeys(file.tensors, file))

    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name].tensors[name]

    def read(self, name: str) -> torch.Tensor:
        return self._where[name].read(name)


def _weight_files(folder: Path, allow_pickle: bool) -> list[Path]:
    pickles = ("pytorch_model.bin.index.json", "pytorch_model.bin") if allow_pickle else ()
    for name in (INDEX, "model.safetensors", *pickles):
        path = folder / name
        if path.exists():
            return _listed(path) if path.suffix == ".json" else [path]
    found = sorted(path.name for path in folder.glob("*.bin"))
    hint = (f"; {', '.join(found)} are pickles, which can run code when opened: --allow-pickle reads them as tensors "
            "alone" if found and not allow_pickle else "")
    raise CheckpointError(f"{folder} holds neither model.safetensors nor {INDEX}{hint}")


def _listed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of weights: {error}") from None
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}, which is not a file of this folder")
        if not (index.parent / name).exists():
            raise DamagedCheckpoint(f"{index.parent}: {name} is missing, which {index.name} lists")
    return [index.parent / name for name in names]


def write_hf_weights(folder: Path, entries: Sequence[Whole], fetch: Callable[[Entry], torch.Tensor],
                     shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the files of weights, and the index where there are several.

    Args:
        fetch: gives the tensor of an entry; called once for each, in order.
        shard_bytes: no file is larger, unless it holds a single tensor.
    """
    shards = divide(entries, lambda entry: entry.num_bytes, shard_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = ["model.safetensors"] if len(shards) == 1 else names
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        for name, shard in zip(names, shards, strict=True):
            write_shard(folder / name, shard, fetch, pool, lambda _: None)
    if len(shards) > 1:
        weight_map = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        index = {"metadata": {"total_size": sum(entry.num_bytes for entry in entries)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
