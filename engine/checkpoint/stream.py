"""A checkpoint made by one process from tensors that come one at a time: conversions and resharding.

What each file will hold is settled first, from shapes alone; then the tensors are fetched in the order in which the
files hold them, each let go as soon as it is written.  Peak memory follows the largest box, not the model.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.checkpoint.commit import write_manifest
from engine.checkpoint.folder import leftover_path, make_directory, publish
from engine.checkpoint.manifest import Manifest, StoredFile
from engine.checkpoint.shard import Entry, file_bytes, write_shard
from engine.distributed.ledger import Block, Ledger
from engine.errors import CheckpointError
from engine.writing import sync_directory

BOX_BYTES = 256 << 20           # larger boxes are cut, which bounds memory


def write_checkpoint(path: Path, step: int, metadata: dict[str, Any], files: Sequence[Sequence[Entry]],
                     fetch: Callable[[Entry], torch.Tensor], threads: int | None = None) -> Path:
    """Commits a checkpoint at `path`, streaming.

    Args:
        files: what each file holds; `spread` makes such a division.
        fetch: gives the tensor of an entry, of shape `entry.box.size`; called once for each.
        threads: for hashing; None: up to 4.

    Raises:
        CheckpointError: `path` exists, the entries do not cover their tensors, or the disk is full.  Nothing is left.
    """
    path = Path(path)
    if path.exists():
        raise CheckpointError(f"{path} is there already; choose another place, or remove it")
    save_id = secrets.token_hex(6)
    writing = leftover_path(path, "writing", save_id)
    try:
        make_directory(writing)
        with ThreadPoolExecutor(threads or min(4, os.cpu_count() or 1)) as pool:
            manifest = _write_files(writing, step, metadata, files, fetch, pool)
        write_manifest(writing, manifest)
        sync_directory(writing)
        publish(writing, path, save_id)
    except (OSError, ValueError) as error:
        needed = sum(file_bytes(entries) for entries in files)
        raise CheckpointError(f"{path} was not written: {error}; it needs {needed:,} bytes") from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return path


def _write_files(writing: Path, step: int, metadata: dict[str, Any], files: Sequence[Sequence[Entry]],
                 fetch: Callable[[Entry], torch.Tensor], pool: ThreadPoolExecutor) -> Manifest:
    ledger = ledger_of(files)                       # before hours of writing
    written = [write_shard(writing / f"rank-{index:05d}.safetensors", entries, fetch, pool, lambda _: None)
               for index, entries in enumerate(files)]
    return Manifest(step, metadata, tuple(StoredFile(file.name, file.num_bytes, file.sha256) for file in written),
                    ledger)


def ledger_of(files: Sequence[Sequence[Entry]]) -> Ledger:
    """Who holds what, from the list of what each file holds.

    Raises:
        ValueError: files disagree about a tensor, or together do not hold all of it.
    """
    catalogues = [[Block(e.key, str(e.dtype).removeprefix("torch."), tuple(e.global_shape), e.box) for e in entries]
                  for entries in files]
    ranges = [np.array([(e.start, e.start + e.num_elements) for e in entries], np.int64).reshape(-1, 2)
              for entries in files]
    ledger = Ledger.of(catalogues, list(enumerate(ranges)))
    ledger.require_all("the files")
    return ledger


def spread(entries: Iterable[Entry], num_files: int) -> list[list[Entry]]:
    """Divides entries among files of about equal size, cutting along the first dimension those too large for that.

    Fewer files come out where there is less than one element for each.
    """
    whole = list(entries)
    share = -(-sum(entry.num_bytes for entry in whole) // num_files)
    parts = [part for entry in whole for part in _cut(entry, min(share, BOX_BYTES))]
    files: list[list[Entry]] = [[] for _ in range(num_files)]
    sizes = [0] * num_files
    for part in sorted(parts, key=lambda part: -part.num_bytes):
        emptiest = sizes.index(min(sizes))
        files[emptiest].append(part)
        sizes[emptiest] += part.num_bytes
    order = {id(part): index for index, part in enumerate(parts)}
    return [sorted(file, key=lambda part: order[id(part)]) for file in files if file]


def _cut(entry: Entry, limit_bytes: int) -> list[Entry]:
    """Blocks of whole rows of at most `limit_bytes`; a single row may be larger."""
    if entry.num_bytes <= limit_bytes or not entry.box.size:
        return [entry]
    rows = entry.box.size[0]
    step = max(1, rows * limit_bytes // entry.num_bytes)
    return [replace(entry, box=entry.box.narrow(0, start, min(step, rows - start))) for start in range(0, rows, step)]

