"""Parameters laid end to end in one vector, whole or a shard of it on every rank.

    param_buffer   p₀ p₁ p₂ …       every parameter is a view
    param_shard    this rank's part of it; memory of its own where the buffer is there around its use only (ZeRO 3)

That is all there is of parameters that are not trained: the base under an adapter.  What is trained has gradients and
masters besides (`engine.parallel.data.buckets`).

"Freed" means that a buffer's storage is resized to nothing: the views stay, and come back to life when it is resized
again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.distributed.boxes import Box, flat_range_boxes
from engine.distributed.collectives import DONE, Work, all_gather_into
from engine.distributed.mesh import Mesh
from engine.distributed.pieces import Piece
from engine.model.parameters import spec_of
from engine.model.spec import ParamSpec

# A parameter starts at a multiple of this many elements: 128 bytes of bf16, so that GEMMs find aligned operands.
ALIGNMENT = 64


@dataclass(frozen=True)
class Entry:
    """One parameter's place in a bucket, and how often a forward pass uses it."""

    parameter: nn.Parameter
    spec: ParamSpec
    offset: int
    uses: int


def free(buffer: Tensor) -> None:
    """Gives the memory back; the tensor and its views keep their shapes."""
    buffer.untyped_storage().resize_(0)


def allocate(buffer: Tensor) -> None:
    """Undoes `free`; the contents are undefined."""
    buffer.untyped_storage().resize_(buffer.numel() * buffer.element_size())


def is_free(buffer: Tensor) -> bool:
    return buffer.untyped_storage().size() == 0


class FlatParameters:
    """Some parameters, moved into one vector.

    Attributes:
        level: 3: a shard of it stays, gathered around each use; 1, 2: it is whole, and a shard of it this rank's to
            update; 0: whole.
    """

    def __init__(self, parameters: Sequence[tuple[nn.Parameter, int]], mesh: Mesh, level: int,
                 dtype: torch.dtype) -> None:
        """Takes the parameters (each with its number of uses) over; their values are lost."""
        self.mesh, self.level = mesh, level
        self.entries: list[Entry] = []
        size = 0
        for parameter, uses in parameters:
            self.entries.append(Entry(parameter, spec_of(parameter), size, uses))
            size += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        num_shards = mesh.shard.size if level else 1
        size = -(-size // (num_shards * ALIGNMENT)) * num_shards * ALIGNMENT
        part = size // num_shards
        self.shard = slice(mesh.shard.index * part, (mesh.shard.index + 1) * part) if level else slice(0, size)
        self.param_buffer = torch.zeros(size, dtype=dtype, device=mesh.device)
        self.param_shard = self.param_buffer[self.shard] if level < 3 else self.param_buffer.new_zeros(part)
        self._gathering: Work = DONE
        for entry in self.entries:
            self._adopt(entry)
        if level >= 3:
            free(self.param_buffer)

    def _adopt(self, entry: Entry) -> None:
        """Makes the parameter a view of the vector."""
        view = nn.Parameter(self._view(self.param_buffer, entry), requires_grad=entry.spec.trainable)
        view.spec = entry.spec  # type: ignore[attr-defined]
        torch.utils.swap_tensors(entry.parameter, view)      # unlike `.data =`, this may leave the meta device

    @staticmethod
    def _view(buffer: Tensor, entry: Entry) -> Tensor:
        return buffer[entry.offset : entry.offset + entry.parameter.numel()].view(entry.spec.local_shape)

    def fill(self, shard: Tensor, entry: Entry, values: Tensor) -> None:
        """Sets this rank's share of a parameter, in a vector laid out like its shard, from its local values."""
        start, stop = self.overlap(entry)
        if start < stop:
            shard[start - self.shard.start : stop - self.shard.start] = \
                values.flatten()[start - entry.offset : stop - entry.offset]

    # ------------------------------------------------------------------ there around its use

    def held(self) -> list[Tensor]:
        """What of them is there between uses."""
        return [self.param_shard if self.level >= 3 else self.param_buffer]

    def start_gather(self, backward: bool = False) -> None:
        """Level 3: starts collecting what a pass needs of the bucket, unless it is there or under way."""
        if not is_free(self.param_buffer):
            return
        allocate(self.param_buffer)
        # The weights get back the values they had.  `.data` keeps that from autograd, which would take it for a change
        # of what it saved.
        whole = self.param_buffer.data
        if self.mesh.shard.size == 1:
            whole.copy_(self.param_shard)
        self._gathering = all_gather_into(whole, self.param_shard, self.mesh.shard)

    def wait_gather(self) -> None:
        """Returns when the parameters may be used."""
        self._gathering.wait()
        self._gathering = DONE

    def release(self) -> None:
        """Level 3: gives the memory of the parameters back."""
        self.wait_gather()
        free(self.param_buffer)

    # ------------------------------------------------------------------ boxes

    def boxes(self, vector: Tensor) -> Iterator[tuple[ParamSpec, Box, Tensor]]:
        """What `vector`, laid out like this rank's shard, holds of each parameter: views, padding left out."""
        for entry in self.entries:
            start, stop = self.overlap(entry)
            for block, place in self._blocks(entry):
                first = max(start, place)
                for box, position in flat_range_boxes(block, first - place, stop - place):
                    at = first - self.shard.start + position
                    yield entry.spec, box, vector[at : at + box.num_elements].view(box.size)

    def pieces(self, prefix: str, vector: Tensor) -> Iterator[Piece]:
        """The same as pieces called `prefix.…`: one per box of a parameter, empty where this shard has none of it."""
        for entry in self.entries:
            for box, place in self._blocks(entry):
                total = box.num_elements                             # without padding, which comes last
                low, high = (min(max(edge - place, 0), total) for edge in self.overlap(entry))
                low, high = (low, high) if low < high else (0, 0)
                at = max(place + low - self.shard.start, 0)
                values, whole = vector[at : at + high - low], high - low == total
                yield Piece(f"{prefix}.{entry.spec.name}", entry.spec.shape, box,
                            values.view(box.size) if whole else values, low)

    @staticmethod
    def _blocks(entry: Entry) -> Iterator[tuple[Box, int]]:
        """The boxes that a rank holds of a parameter, and where in the bucket each begins."""
        place = entry.offset
        for box, _ in entry.spec.held:
            yield box, place
            place += box.num_elements

    def overlap(self, entry: Entry) -> tuple[int, int]:
        """The part of the bucket that belongs both to the parameter and to this rank's shard."""
        return (max(entry.offset, self.shard.start),
                min(entry.offset + entry.parameter.numel(), self.shard.stop))
