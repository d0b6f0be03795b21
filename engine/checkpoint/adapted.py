"""A model that was trained with an adapter: the base's tensors, with the adapter's product added where they are read.

A run with `adapter` saves what it trains and nothing else.  Its checkpoints say which model lies below: where it was,
and the content hash of its manifest, which vouches for every byte of it (`engine.checkpoint.manifest`).  Whoever wants
the model opens it here and reads the weight

    W + (alpha / rank) · B·A          in fp32, for the box that is asked for

under the name that W has in any checkpoint.  The base may itself be such a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from engine.checkpoint.read import CheckpointReader
from engine.checkpoint.resume import Progress, open_checkpoint
from engine.config import AdapterConfig
from engine.distributed.agree import Group
from engine.distributed.boxes import Box
from engine.distributed.pieces import Piece
from engine.errors import CheckpointError
from engine.model.projections import FUSED

BASE = "base"                           # where a checkpoint's metadata say what lies under its adapter
MODEL, WEIGHT, A, B = "model.", ".weight", ".lora_a", ".lora_b."


@dataclass(frozen=True)
class Base:
    """The model under an adapter.

    Attributes:
        content: hash of its manifest.
    """

    path: Path
    content: str

    @staticmethod
    def of(reader: CheckpointReader) -> Base:
        return Base(reader.path.resolve(), reader.content)

    @staticmethod
    def saved(metadata: Mapping[str, Any]) -> Base | None:
        """What a checkpoint's metadata say of it; None: it holds a whole model."""
        entry = metadata.get(BASE)
        return Base(Path(entry["path"]), entry["content"]) if entry else None

    def metadata(self) -> dict[str, str]:
        return {"path": str(self.path), "content": self.content}

    def open(self, path: Path | None = None, group: Group = None, progress: Progress | None = None) -> CheckpointReader:
        """The model, from where it was or from `path`; every rank of `group` must call this.

        Raises:
            CheckpointError: it is not there, is damaged, or is another one.
        """
        try:
            reader = open_model(path or self.path, group, progress)
        except CheckpointError as error:
            raise CheckpointError(f"{error}\n  it should be the model under an adapter; --base says where that "
                                  "is now (for a run: checkpoint.load)") from None
        if reader.content != self.content:
            raise CheckpointError(f"{reader.path} is not the model that the adapter was trained on: its manifest has "
                                  f"the hash {reader.content[:12]}…, that one's has {self.content[:12]}…")
        return reader


def open_model(path: Path, group: Group = None, progress: Progress | None = None,
               base: Path | None = None) -> CheckpointReader:
    """As `open_checkpoint`, of whatever holds a model; with an adapter it is the model under that, and the adapter.

    Args:
        base: where the model under the adapter is now; None: where it was.

    Raises:
        CheckpointError: as there; or the model under the adapter is not there, or is another one.
    """
    reader = open_checkpoint(path, progress, group)
    below = Base.saved(reader.metadata)
    if below is None:
        return reader
    return AdaptedReader(reader, below.open(base, group, progress))


def adapter_config(metadata: Mapping[str, Any], path: Path) -> AdapterConfig:
    """The adapter's section of the configuration that a checkpoint was saved with.

    Raises:
        CheckpointError: there is none, or it makes no sense.
    """
    try:
        return AdapterConfig.model_validate(metadata["config"]["adapter"])
    except (KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(f"{path} does not say which adapter it holds: {error}") from None


class AdaptedReader(CheckpointReader):
    """Reads an adapter and the model under it as one model; files and steps are the adapter's."""

    def __init__(self, adapter: CheckpointReader, base: CheckpointReader) -> None:
        super().__init__(adapter.path)
        self.adapter, self.base = adapter, base
        self.config = adapter_config(adapter.metadata, adapter.path)

    @property
    def metadata(self) -> dict[str, Any]:
        """Those of the adapter's run, without the adapter."""
        own = {key: value for key, value in self.adapter.metadata.items() if key != BASE}
        return own | {"config": {key: value for key, value in own["config"].items() if key != "adapter"}}

    def keys(self) -> list[str]:
        own = [key for key in self.adapter.keys() if key.startswith(MODEL) and A not in key and B not in key]
        return [*(key for key in self.base.keys() if key.startswith(MODEL) and key not in own), *own]

    def __contains__(self, key: str) -> bool:
        return key in self.adapter or key in self.base

    def global_shape(self, key: str) -> tuple[int, ...]:
        return self._owner(key).global_shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return torch.float32 if self._adapted(key) else self._owner(key).dtype(key)

    def read(self, key: str, box: Box | None = None) -> torch.Tensor:
        if not self._adapted(key):
            return self._owner(key).read(key, box)
        box = Box.whole(self.base.global_shape(key)) if box is None else box
        values = self.base.read(key, box).float()
        for region, product in self._products(key, box):
            values[region.within(box)] += product
        return values

    def load_into(self, pieces: Sequence[Piece], strict: bool = True, convert: bool = False) -> list[str]:
        own = [piece for piece in pieces if piece.key in self.adapter]
        others = [piece for piece in pieces if piece.key not in self.adapter]
        self.adapter.load_into(own, strict, convert)
        missing = self.base.load_into([piece for piece in others if not self._adapted(piece.key)], strict, convert)
        for piece in others:
            if self._adapted(piece.key) and piece.tensor.numel():
                self._check(piece, convert)
                values = self.read(piece.key, piece.box)
                piece.tensor.detach().copy_(values if piece.is_whole else values.flatten()[piece.start : piece.stop])
        return missing

    def _owner(self, key: str) -> CheckpointReader:
        return self.adapter if key in self.adapter else self.base

    def _adapted(self, key: str) -> bool:
        return key.endswith(WEIGHT) and key.removesuffix(WEIGHT) + A in self.adapter

    def _products(self, key: str, box: Box) -> Iterator[tuple[Box, torch.Tensor]]:
        """What is added to a weight: boxes in `box`, and their values."""
        layer, whole = key.removesuffix(WEIGHT), Box.whole(self.base.global_shape(key))
        a = self.adapter.read(layer + A).float()
        for its_a, (name, dim, start, length) in zip(a, adapted_rows(self.adapter, layer, whole.size), strict=True):
            region = whole.narrow(dim, start, length).intersect(box)
            if region is None:
                continue
            offset, size = list(region.offset), region.size
            offset[dim] -= start
            columns = its_a[:, offset[-1] : offset[-1] + size[-1]]
            rows = Box((*offset[:-1], 0), (*size[:-1], len(its_a)))
            b = self.adapter.read(f"{layer}{B}{name}", rows).float()
            yield region, (b.flatten(0, -2) @ columns).mul_(self.config.scale).view(size)


def adapted_rows(adapter: CheckpointReader, layer: str, shape: Sequence[int]) -> list[tuple[str, int, int, int]]:
    """The projections of a layer that have a B, in the order of their A's.

    Args:
        layer: name of the layer's weight, without `.weight`.
        shape: of that.

    Returns:
        Name, and dimension, first index and number of indices in the weight.
    """
    fused = FUSED[layer.rpartition(".")[2]]
    return [(name, fused.dim, start, length) for name, start, length in fused.rows(shape[fused.dim])
            if f"{layer}{B}{name}" in adapter]
