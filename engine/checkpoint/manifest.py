"""The manifest: what a checkpoint consists of, with a hash of itself.

A JSON object whose last member is `"sha256"`, the hash of all bytes before it.  It is written last and read first;
nothing in a checkpoint is believed that the manifest does not vouch for.

Which file holds which part of a tensor is a ledger (`engine.distributed.ledger`) whose holders are files.  Written down
are runs of tiles: shards of equal length, one behind the other, in files whose numbers grow by a constant.  The state
of 2,048 ranks, a million tiles under ZeRO 3, takes a megabyte.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from engine.checkpoint.metadata import check_metadata
from engine.distributed.boxes import Box, inside
from engine.distributed.ledger import Block, Integers, Ledger
from engine.errors import CheckpointError
from engine.reading import parse_object, said, shown

FORMAT = "octant-checkpoint"
VERSION = 2
MANIFEST_NAME = "manifest.json"
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
HASH_TEXT = re.compile(r"[0-9a-f]{64}")
MOST_TILES = 1 << 24                # more parts than any job writes; what claims more is nonsense
LEAST_HEADER = 32                   # bytes that a part takes in the header of its file, at the least
# Types by the names that safetensors and torch give them.
NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
         "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
         "BOOL": "bool"}
CODES = {name: code for code, name in NAMES.items()}


class DamagedCheckpoint(CheckpointError):
    """The checkpoint is not what was written: something is missing, cut short or changed."""


@dataclass(frozen=True)
class StoredFile:
    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor, and in how many parts it is stored."""

    dtype: str
    shape: tuple[int, ...]
    num_parts: int


@dataclass(frozen=True)
class Manifest:
    """Attributes: `ledger` says where the parts of each tensor are; its holders are numbers of `files`."""

    step: int
    metadata: dict[str, Any]
    files: tuple[StoredFile, ...]
    ledger: Ledger

    @property
    def num_bytes(self) -> int:
        """Bytes of all files of tensors."""
        return sum(file.num_bytes for file in self.files)

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """By global name."""
        return {key: StoredTensor(CODES[self.ledger.kind(key)[0]], self.ledger.kind(key)[1],
                                  len(self.ledger.tiles_of(key))) for key in self.ledger.keys}


def encode_manifest(manifest: Manifest) -> bytes:
    """The text of `manifest.json`."""
    body = {
        "format": FORMAT, "version": VERSION, "step": manifest.step, "metadata": manifest.metadata,
        "files": [{"name": f.name, "bytes": f.num_bytes, "sha256": f.sha256} for f in manifest.files],
        "tensors": _encode_ledger(manifest.ledger)}
    text = json.dumps(body, separators=(",", ":")).encode()[:-1]
    return text + b',"sha256":"' + hashlib.sha256(text).hexdigest().encode() + b'"}\n'


def _encode_ledger(ledger: Ledger) -> dict[str, Any]:
    """By tensor: type, shape, and its blocks `[offset, size, runs]`; a block that one file holds has its number."""
    tensors: dict[str, Any] = {}
    runs = _runs(ledger)
    edges = np.searchsorted(runs[:, 0], np.arange(len(ledger.blocks) + 1)).tolist()
    rows = runs[:, 1:].tolist()
    for block, (first, last) in zip(ledger.blocks, pairwise(edges), strict=True):
        if first == last:
            continue
        entry = tensors.setdefault(block.key, {"dtype": CODES[block.dtype], "shape": block.shape, "blocks": []})
        there: Any = rows[first:last]
        if len(there) == 1 and there[0][:3] == [0, block.num_elements, 1]:
            there = there[0][3]
        entry["blocks"].append([block.box.offset, block.box.size, there])
    return tensors


def _runs(ledger: Ledger) -> Integers:
    """Rows [block, start, length, count, file, step]: `count` tiles of `length` elements each from `start` on, in the
    files `file`, `file + step`, …
    """
    block, start, length = ledger.block, ledger.start, ledger.stop - ledger.start
    file = ledger.holders[ledger.first[:-1]]
    if not len(block):
        return np.empty((0, 6), np.int64)
    follows = np.zeros(len(block), bool)                  # the tile before, in one run
    follows[1:] = (block[1:] == block[:-1]) & (length[1:] == length[:-1]) & (start[1:] == ledger.stop[:-1])
    step = np.zeros(len(block), np.int64)
    step[1:] = file[1:] - file[:-1]
    turns = np.zeros(len(block), bool)                    # the step is another one than before
    turns[2:] = follows[2:] & follows[1:-1] & (step[2:] != step[1:-1])
    first = np.flatnonzero(~follows | turns)
    count = np.diff(np.r_[first, len(block)])
    steps = np.where(count > 1, step[np.minimum(first + 1, len(block) - 1)], 0)
    return np.stack((block[first], start[first], length[first], count, file[first], steps), axis=1)


def decode_manifest(data: bytes, where: Path) -> Manifest:
    """Reads `manifest.json`, of this version or an earlier one.

    Raises:
        DamagedCheckpoint: its hash does not fit, or it contradicts itself or names files outside its directory.
        CheckpointError: it is whole, but of a format that this version cannot read.
    """
    tail = re.fullmatch(rb'(.*),"sha256":"([0-9a-f]{64})"\}\n', data, re.DOTALL)
    if tail is None:
        raise DamagedCheckpoint(f"{where}: the manifest is cut short ({len(data):,} bytes)")
    if hashlib.sha256(tail[1]).hexdigest().encode() != tail[2]:
        raise DamagedCheckpoint(f"{where}: the manifest's content does not have the hash it states")
    try:
        body = parse_object(tail[1] + b"}")
        if body.get("format") != FORMAT:
            raise ValueError(f"format {shown(body.get('format'))}, expected {FORMAT!r}")
        _require_version(body.get("version"), where)
        return _parse(body)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DamagedCheckpoint(f"{where}: the manifest makes no sense: {said(error)}") from None


def _require_version(version: Any, where: Path) -> None:
    if type(version) is not int or version not in BLOCKS_OF:
        raise CheckpointError(f"{where}: format version {shown(version)}, this Octant reads versions up to {VERSION}; "
                              "use the version of Octant that wrote it")


def _parse(body: dict[str, Any]) -> Manifest:
    files = tuple(_parse_file(entry) for entry in body["files"])
    if len({file.name for file in files}) != len(files):
        raise ValueError("two files of one name")
    step, metadata = body["step"], body["metadata"]
    if type(step) is not int or not 0 <= step < 1 << 62 or not isinstance(metadata, dict):
        raise ValueError("step or metadata is of the wrong type")
    check_metadata(metadata, step)
    return Manifest(step, metadata, files, _parse_tensors(body, files))


def _parse_file(entry: dict[str, Any]) -> StoredFile:
    if not FILE_NAME.fullmatch(entry["name"]):
        raise ValueError(f"file name {shown(entry['name'])} is not a plain name inside the checkpoint")
    if not HASH_TEXT.fullmatch(entry["sha256"]):
        raise ValueError(f"{shown(entry['name'])}: its hash is {shown(entry['sha256'])}")
    [num_bytes] = _plain([entry["bytes"]], f"the size of {entry['name']}")
    return StoredFile(entry["name"], num_bytes, entry["sha256"])


def _plain(numbers: Any, what: str) -> tuple[int, ...]:
    """A list of sizes: integers, not negative, of 62 bits."""
    if not isinstance(numbers, list) or not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
        raise ValueError(f"{what}: {shown(numbers)}")
    return tuple(numbers)


def _blocks_of_version_1(entry: dict[str, Any]) -> Iterator[tuple[Any, Any, Any]]:
    """Every box was in one file: `boxes` had rows `[file, offset, size]`."""
    return ((offset, size, file) for file, offset, size in entry["boxes"])


BLOCKS_OF = {1: _blocks_of_version_1, 2: lambda entry: iter(entry["blocks"])}


def _parse_tensors(body: dict[str, Any], files: Sequence[StoredFile]) -> Ledger:
    found: list[tuple[Block, list[list[int]]]] = []
    for key, entry in body["tensors"].items():
        shape = _plain(entry["shape"], f"the shape of {shown(key)}")
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in NAMES:
            raise ValueError(f"{shown(key)} has the unknown type {shown(entry['dtype'])}")
        for offset, size, runs in BLOCKS_OF[body["version"]](entry):
            box = Box(_plain(offset, f"where a box of {shown(key)} lies"), _plain(size, f"a box of {shown(key)}"))
            if not inside(box, shape):
                raise ValueError(f"a box of {shown(key)} leaves its shape {shown(shape)}")
            rows = [[0, box.num_elements, 1, runs, 0]] if type(runs) is int else runs
            if not all(type(number) is int for row in rows for number in row):
                raise ValueError(f"a box of {shown(key)} is stored in {shown(runs)}")
            found.append((Block(key, NAMES[entry["dtype"]], shape, box), rows))
        if not found or found[-1][0].key != key:
            raise ValueError(f"{shown(key)} is stored nowhere")
    ledger = _expand(found, len(files), sum(file.num_bytes for file in files))
    ledger.require_all("the files")
    return ledger


def _expand(found: Sequence[tuple[Block, list[list[int]]]], num_files: int, num_bytes: int) -> Ledger:
    """The ledger of some blocks with their runs; the files have `num_bytes` in all.

    Raises:
        ValueError: a run is nonsense.
    """
    blocks = sorted({block for block, _ in found})
    numbers = {block: number for number, block in enumerate(blocks)}
    runs: Integers = np.array([[numbers[block], *run] for block, rows in found for run in rows],
                              np.int64).reshape(-1, 6)
    block, start, length, count, file, step = runs.T
    sizes = np.array([one.num_elements for one in blocks], np.int64)
    last = file + step * (count - 1)
    room = sizes[block] - start
    most = min(MOST_TILES, num_bytes // LEAST_HEADER)
    if not ((start >= 0) & (room >= 0) & (length >= 0) & (count >= 1) & (count <= most)
            & (length <= room // np.maximum(count, 1)) & (file >= 0) & (file < num_files)
            & (np.abs(step) <= num_files) & (last >= 0) & (last < num_files)).all() or count.sum() > most:
        raise ValueError("a run of parts leaves its block, or names a file that is not listed")
    nth: Integers = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    block, start, length, file, step = (np.repeat(c, count) for c in (block, start, length, file, step))
    holders: Integers = file + nth * step
    start = start + nth * length
    order = np.lexsort((start, block))
    block, start, stop, holders = block[order], start[order], (start + length)[order], holders[order]
    return Ledger(blocks, block, start, stop, np.arange(len(block) + 1), holders, holders)
