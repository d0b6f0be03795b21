"""The manifest: what a checkpoint consists of, with a hash of itself.

A JSON object whose last member is `"sha256"`, the hash of all bytes before it.  It is written last and read first;
nothing in a checkpoint is believed that the manifest does not vouch for.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.distributed.boxes import Box
from engine.distributed.pieces import inside
from engine.errors import CheckpointError

FORMAT = "octant-checkpoint"
VERSION = 1
MANIFEST_NAME = "manifest.json"
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
HASH_TEXT = re.compile(r"[0-9a-f]{64}")


class DamagedCheckpoint(CheckpointError):
    """The checkpoint is not what was written: something is missing, cut short or changed."""


@dataclass(frozen=True)
class StoredFile:
    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor and where its boxes are: `files[i]`, an index into the manifest's files, holds `boxes[i]`."""

    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    files: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    step: int
    metadata: dict[str, Any]
    files: tuple[StoredFile, ...]
    tensors: Mapping[str, StoredTensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files of tensors."""
        return sum(file.num_bytes for file in self.files)


def encode_manifest(manifest: Manifest) -> bytes:
    """The text of `manifest.json`."""
    body = {
        "format": FORMAT, "version": VERSION, "step": manifest.step, "metadata": manifest.metadata,
        "files": [{"name": f.name, "bytes": f.num_bytes, "sha256": f.sha256} for f in manifest.files],
        "tensors": {key: {"dtype": t.dtype, "shape": t.shape,
                          "boxes": [[f, b.offset, b.size] for f, b in zip(t.files, t.boxes, strict=True)]}
                    for key, t in sorted(manifest.tensors.items())}}
    text = json.dumps(body, separators=(",", ":")).encode()[:-1]
    return text + b',"sha256":"' + hashlib.sha256(text).hexdigest().encode() + b'"}\n'


def decode_manifest(data: bytes, where: Path) -> Manifest:
    """Reads `manifest.json`.

    Raises:
        DamagedCheckpoint: its hash does not fit, or it contradicts itself or names files outside its directory.
        CheckpointError: it is whole, but of a format that this version cannot read.
    """
    tail = re.fullmatch(rb'(.*),"sha256":"([0-9a-f]{64})"\}\n', data, re.DOTALL)
    if tail is None:
        raise DamagedCheckpoint(f"{where}: the manifest is cut short ({len(data):,} bytes)")
    if hashlib.sha256(tail[1]).hexdigest().encode() != tail[2]:
        raise DamagedCheckpoint(f"{where}: the manifest's content does not have the hash it states")
    body = json.loads(tail[1] + b"}")
    if body.get("format") != FORMAT:
        raise DamagedCheckpoint(f"{where}: format {body.get('format')!r}, expected {FORMAT!r}")
    if body.get("version") != VERSION:
        raise CheckpointError(f"{where}: format version {body.get('version')}, this Octant reads version {VERSION}; "
                              "use the version of Octant that wrote it")
    try:
        return _parse(body)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedCheckpoint(f"{where}: the manifest makes no sense: {error}") from None


def _parse(body: dict[str, Any]) -> Manifest:
    files = tuple(_parse_file(entry) for entry in body["files"])
    if len({file.name for file in files}) != len(files):
        raise ValueError("two files of one name")
    tensors = {key: _parse_tensor(key, entry, len(files)) for key, entry in body["tensors"].items()}
    if not isinstance(body["step"], int) or not isinstance(body["metadata"], dict):
        raise ValueError("step or metadata is of the wrong type")
    return Manifest(body["step"], body["metadata"], files, tensors)


def _parse_file(entry: dict[str, Any]) -> StoredFile:
    if not FILE_NAME.fullmatch(entry["name"]):
        raise ValueError(f"file name {entry['name']!r} is not a plain name inside the checkpoint")
    if not HASH_TEXT.fullmatch(entry["sha256"]) or not isinstance(entry["bytes"], int):
        raise ValueError(f"{entry['name']}: size or hash is of the wrong type")
    return StoredFile(entry["name"], entry["bytes"], entry["sha256"])


def _parse_tensor(key: str, entry: dict[str, Any], num_files: int) -> StoredTensor:
    shape = tuple(int(n) for n in entry["shape"])
    boxes = tuple(Box(tuple(offset), tuple(size)) for _, offset, size in entry["boxes"])
    files = tuple(int(file) for file, _, _ in entry["boxes"])
    if not all(inside(box, shape) for box in boxes):
        raise ValueError(f"a box of {key} leaves its shape {shape}")
    if not all(0 <= file < num_files for file in files):
        raise ValueError(f"{key} names a file that is not listed")
    return StoredTensor(str(entry["dtype"]), shape, boxes, files)


def assemble_tensors(parts: Sequence[Sequence[Sequence[Any]]]) -> dict[str, StoredTensor]:
    """The manifest's tensors from what each file holds: rows `[key, dtype, shape, offset, size]`, a list per file.

    Raises:
        ValueError: files disagree about a tensor, or together do not hold all of it.
    """
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    boxes: dict[str, list[tuple[Box, int]]] = {}
    for index, rows in enumerate(parts):
        for key, dtype, shape, offset, size in rows:
            kind = (dtype, tuple(shape))
            if kinds.setdefault(key, kind) != kind:
                raise ValueError(f"{key} is {kinds[key]} on one rank and {kind} on another")
            boxes.setdefault(key, []).append((Box(tuple(offset), tuple(size)), index))
    tensors = {}
    for key, (dtype, shape) in kinds.items():
        found = sorted(boxes[key])
        held, total = sum(box.num_elements for box, _ in found), Box.whole(shape).num_elements
        if held < total:
            raise ValueError(f"{key}: the ranks together hold {held:,} of its {total:,} elements")
        tensors[key] = StoredTensor(dtype, shape, tuple(b for b, _ in found), tuple(f for _, f in found))
    return tensors
