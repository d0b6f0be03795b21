"""Weights in a Hugging Face folder: one `model.safetensors`, or several with an index of which tensor is where.

Which files count where a folder holds several kinds is `transformers`' choice, not ours: a single file before an index,
safetensors before pickles.  An index must be of the files beside it.

Tensors are read and written one at a time, with `read` and `write` rather than memory maps, so that what a process
holds is one tensor and not whatever the kernel keeps of a file.  Writing is the checkpoint engine's own writer.

`pytorch_model.bin` is a pickle.  It is read only where that was asked for, and then by torch's reader of tensors alone
(`archives`), which runs no code of the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from checkpoints_tools.archives import read_tensors
from checkpoints_tools.families import Family
from checkpoints_tools.names import ROWS, Part, hf_parts
from checkpoints_tools.output import divide
from checkpoints_tools.recognise import HUGGING_FACE, instead
from engine.checkpoint.manifest import DamagedCheckpoint
from engine.checkpoint.shard import Entry, ShardFile, memory_of, write_shard
from engine.config import ModelConfig
from engine.distributed.boxes import Box
from engine.errors import CheckpointError
from engine.reading import read_object, shown

SHARD_BYTES = 5 * 10**9                 # Hugging Face's own default
HASH_THREADS = 2
SAFE = ".safetensors"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
FILE_NAME = re.compile(r"[^/\\\0]+\.(safetensors|bin)")
BY_REQUEST = "these are pickles, which can run code when opened: --allow-pickle reads them as tensors alone"
TRAINED = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
EMBEDDING, HEAD = "embedding.weight", "output_layer.weight"             # ours
# Computed from the configuration; old files carry them along: frequencies, and GPT-2's and GPT-NeoX's causal masks.
NO_WEIGHT = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")


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

    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]

    def read(self, name: str) -> torch.Tensor: ...


class SafetensorsFile:
    """
    Raises:
        DamagedCheckpoint: the file is not whole.
    """

    def __init__(self, path: Path) -> None:
        self._file = ShardFile(path)                # refuses what is not whole
        self.tensors = {name: (stored.dtype, stored.shape) for name, stored in self._file.tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        stored = self._file.tensors[name]
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        self._file.read_into(memory_of(tensor), stored.start)
        return tensor


class _PickleFile:
    def __init__(self, path: Path) -> None:
        self._tensors = read_tensors(path)
        self.tensors = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach()


class HFWeights:
    """The weights of a Hugging Face folder: those that `transformers` would load.

    Args:
        allow_pickle: read `.bin` files where there are no safetensors.

    Raises:
        CheckpointError: there are no weights, a file is missing or damaged, an index is of other files, a tensor is in
            two files or of a type that no weight is trained in, or only pickles are there.
    """

    def __init__(self, folder: Path, allow_pickle: bool = False) -> None:
        self.folder = folder
        self._where: dict[str, _WeightFile] = {}
        found, listed = _weight_files(folder, allow_pickle)
        for path in found:
            self._take(path, {name for name, file in listed.items() if file == path.name})

    def _take(self, path: Path, expected: set[str]) -> None:
        file: _WeightFile = SafetensorsFile(path) if path.suffix == SAFE else _PickleFile(path)
        if astray := expected - file.tensors.keys():
            raise DamagedCheckpoint(f"{path} holds no {shown(min(astray))}, which the index says it does: they are not"
                                    " of the same model")
        for name, (dtype, _) in file.tensors.items():
            if name in self._where:
                raise CheckpointError(f"{path}: {name} is in another of the folder's files, too")
            if dtype not in TRAINED and not name.endswith(NO_WEIGHT):
                raise CheckpointError(f"{path}: {name} is {dtype}, as quantised weights are; Octant converts weights in"
                                      " fp32, bf16 or fp16")
            self._where[name] = file

    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name].tensors[name][1]

    def read(self, name: str) -> torch.Tensor:
        return self._where[name].read(name)

    def block(self, part: Part) -> torch.Tensor:
        """A block of a tensor, in the shape of the block of ours that it is."""
        tensor = self.read(part.name)
        rows = tensor.T if part.transposed else tensor
        return rows[part.first : part.first + part.shape[0]].reshape(part.box.size)

    def parts(self, config: ModelConfig, family: Family) -> dict[str, list[Part]]:
        """Per parameter of ours, the tensors it is made of.

        One matrix that serves twice may bear the head's name, and the files of a model that was saved without its head
        lack the first word of the others'.
        """
        parts = {ours: [self._as_named(part) for part in found] for ours, found in hf_parts(config, family).items()}
        [embedding] = parts[EMBEDDING]
        head = head_name(family)
        if config.tie_embeddings and embedding.name not in self._where and head in self._where:
            parts[EMBEDDING] = [replace(embedding, name=head)]
        return parts

    def _as_named(self, part: Part) -> Part:
        without_head = part.name.partition(".")[2]
        found = part.name not in self._where and without_head in self._where
        return replace(part, name=without_head) if found else part


def head_name(family: Family) -> str:
    """What the output layer is called there."""
    [name] = family.names.get(HEAD, ROWS[HEAD].hf)
    return name


def _weight_files(folder: Path, allow_pickle: bool) -> tuple[list[Path], dict[str, str]]:
    """The files to read, in `transformers`' order of preference, and which tensor an index says is where."""
    for name in (WEIGHTS, INDEX, *(PICKLES if allow_pickle else ())):
        path = folder / name
        if not path.exists():
            continue
        listed = _index(path) if path.suffix == ".json" else {}
        names = sorted(set(listed.values())) if listed else [name]
        if not allow_pickle and (pickles := [name for name in names if not name.endswith(SAFE)]):
            raise CheckpointError(f"{path} names {', '.join(map(shown, pickles[:3]))}; {BY_REQUEST}")
        return [folder / name for name in names], listed
    found = sorted(path.name for path in folder.glob("*.bin"))
    hint = f"{', '.join(found[:3])}: {BY_REQUEST}" if found and not allow_pickle else instead(folder, HUGGING_FACE)
    raise CheckpointError(f"{folder} holds neither {WEIGHTS} nor {INDEX}; {hint}")


def _index(path: Path) -> dict[str, str]:
    """`weight_map`: tensor → file."""
    listed = read_object(path, "an index of weights", CheckpointError).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{path} is not an index of weights: weight_map is {shown(listed)}")
    if wrong := [name for name in listed.values() if not isinstance(name, str) or not FILE_NAME.fullmatch(name)]:
        raise CheckpointError(f"{path} names {shown(wrong[0])}, which is not a file of weights in this folder")
    if missing := sorted(name for name in set(listed.values()) if not (path.parent / name).exists()):
        raise DamagedCheckpoint(f"{path.parent}: {missing[0]} is missing, which {path.name} lists")
    return listed


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
