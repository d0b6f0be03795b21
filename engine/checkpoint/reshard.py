"""Rewriting a checkpoint as another number of files, offline.

Loading never needs it: any layout reads any checkpoint.  It helps when thousands of small files are slow to open or to
copy, or when a node should read one file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from engine.checkpoint.read import CheckpointReader
from engine.checkpoint.shard import Entry
from engine.checkpoint.stream import spread, write_checkpoint
from engine.distributed.boxes import Box
from engine.errors import CheckpointError


def reshard(source: CheckpointReader, output: Path, num_files: int,
            progress: Callable[[int], None] | None = None) -> Path:
    """Writes the tensors and metadata of `source` to a new checkpoint at `output`.

    Each tensor is stored whole, or in blocks of rows.  The caller verifies `source` first.

    Args:
        progress: told the bytes copied, as they are.

    Raises:
        CheckpointError: `output` exists, `num_files` is not positive, or `output` cannot be written.
    """
    if num_files < 1:
        raise CheckpointError(f"{num_files} files were asked for; at least 1 is needed")
    whole = [Entry(key, source.global_shape(key), Box.whole(source.global_shape(key)), source.dtype(key))
             for key in source.keys()]

    def fetch(entry: Entry) -> torch.Tensor:
        if progress is not None:
            progress(entry.num_bytes)
        return source.read(entry.key, entry.box)

    return write_checkpoint(output, source.step, source.metadata, spread(whole, num_files), fetch)
