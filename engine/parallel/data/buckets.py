"""Flat buckets: the memory in which parameters, gradients and optimizer state live.

The parameters of a chunk are laid end to end, in the order in which the backward pass finishes them, into buckets of a
few million elements:

    param_buffer   compute dtype   p₀ p₁ p₂ …        every parameter is a view
    grad_buffer    fp32            g₀ g₁ g₂ …        every `GradSlot` adds into a view
    master         fp32            this rank's shard; a view of param_buffer where that is fp32 already

When the last contribution of the step to the last parameter of a bucket has arrived, the bucket's reduction over the
ranks that share these parameters starts, while the backward pass goes on with the next bucket.  With ZeRO-1
(Rajbhandari et al. 2020, section 5.1) it is a reduce-scatter: each rank gets the sum of its own shard, updates it, and
an all-gather publishes the result.  With level 0 it is an all-reduce, and the shard is the whole bucket.

All parameters of a bucket share whatever decides what happens to them (`BucketKind`), so gradient norm, clipping and
AdamW treat a bucket as one vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.distributed.boxes import Box, flat_range_boxes
from engine.distributed.collectives import DONE, Work, all_gather_into, all_reduce, reduce_scatter_into, sum_with_peer
from engine.distributed.mesh import Mesh
from engine.model.spec import ParamSpec, spec_of
from engine.parallel.gradients import GradSlot, attach_slot

# A parameter starts at a multiple of this many elements: 128 bytes of bf16, so that GEMMs find aligned operands.
ALIGNMENT = 64
DEFAULT_BUCKET_ELEMENTS = 40_000_000


@dataclass(frozen=True)
class BucketKind:
    """What the parameters of a bucket have in common.

    Attributes:
        decay: weight decay applies.
        partial_sum: gradients are summed over the tensor axis first.
        counted: this rank's elements count in the gradient norm (a replica on another rank does not count again).
        tied: an embedding that is also the output layer, on another stage: the two stages sum their gradients.
    """

    decay: bool
    partial_sum: bool
    counted: bool
    tied: bool


@dataclass(frozen=True)
class Entry:
    """One parameter's place in a bucket."""

    parameter: nn.Parameter
    spec: ParamSpec
    offset: int
    uses: int


def kind_of(spec: ParamSpec, mesh: Mesh, uses: int) -> BucketKind:
    """The bucket kind of a parameter that this rank's chunks use so many times."""
    replicated = spec.cut is None and mesh.tensor.index > 0
    return BucketKind(decay=spec.decay, partial_sum=spec.partial_sum, counted=not replicated and not spec.tied_copy,
                      tied=spec.tied and uses == 1)


class Bucket:
    """One flat vector of parameters with its gradient and this rank's shard."""

    def __init__(self, kind: BucketKind, parameters: Sequence[tuple[nn.Parameter, int]], mesh: Mesh, *, level: int,
                 dtype: torch.dtype, reduce_dtype: torch.dtype) -> None:
        """`parameters`: with how often each is used in a forward pass; they are moved into the bucket's memory."""
        self.kind, self.mesh, self.level, self.reduce_dtype = kind, mesh, level, reduce_dtype
        self.entries: list[Entry] = []
        size = 0
        for parameter, uses in parameters:
            self.entries.append(Entry(parameter, spec_of(parameter), size, uses))
            size += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        num_shards = mesh.gradient.size if level else 1
        size = -(-size // (num_shards * ALIGNMENT)) * num_shards * ALIGNMENT
        part = size // num_shards
        self.shard = slice(mesh.gradient.index * part, (mesh.gradient.index + 1) * part) if level else slice(0, size)
        self.param_buffer = torch.zeros(size, dtype=dtype, device=mesh.device)
        self.grad_buffer = torch.zeros(size, dtype=torch.float32, device=mesh.device)
        mine = self.param_buffer[self.shard]
        self.master = mine if dtype == torch.float32 else torch.zeros_like(mine, dtype=torch.float32)
        self._reducing = self.grad_buffer      # what is being reduced: the gradient, or its bf16 copy
        self._work: Work = DONE
        self._incomplete = 0
        self._slots = [self._adopt(entry) for entry in self.entries]

    def _adopt(self, entry: Entry) -> GradSlot:
        """Makes the parameter a view of the bucket and routes its gradient here."""
        view = nn.Parameter(self._view(self.param_buffer, entry))
        view.spec = entry.spec  # type: ignore[attr-defined]
        torch.utils.swap_tensors(entry.parameter, view)      # unlike `.data =`, this may leave the meta device
        grad = self._view(self.grad_buffer, entry)
        slot = GradSlot(lambda: grad, self._on_complete)
        attach_slot(entry.parameter, slot)
        return slot

    @staticmethod
    def _view(buffer: Tensor, entry: Entry) -> Tensor:
        return buffer[entry.offset : entry.offset + entry.parameter.numel()].view(entry.spec.local_shape)

    def begin_step(self, num_microbatches: int) -> None:
        """Expects the contributions of a step."""
        self._incomplete = len(self._slots)
        for entry, slot in zip(self.entries, self._slots, strict=True):
            slot.expect(num_microbatches * entry.uses)

    def _on_complete(self) -> None:
        self._incomplete -= 1
        if self._incomplete == 0 and not self.kind.tied:
            self._reduce()

    def _reduce(self) -> None:
        """Starts the sum over the ranks that hold the same parameters."""
        if self.kind.partial_sum:
            all_reduce(self.grad_buffer, self.mesh.tensor)
        axis = self.mesh.gradient
        self._reducing = buffer = self.grad_buffer if axis.size == 1 else self.grad_buffer.to(self.reduce_dtype)
        if self.level == 0:
            self._work = all_reduce(buffer, axis, asynchronous=True)
        else:
            self._work = reduce_scatter_into(buffer[self.shard], buffer, axis)

    def finish_reduction(self) -> None:
        """Waits until `grad_shard` is the sum over all ranks and microbatches.

        Raises:
            RuntimeError: a parameter did not get its gradient, naming it: a schedule or a layer is wrong.
        """
        if self._incomplete:
            missing = [e.spec.name for e, s in zip(self.entries, self._slots, strict=True) if s.missing]
            raise RuntimeError(f"no complete gradient for {', '.join(missing)}")
        if self.kind.tied:
            pipeline = self.mesh.pipeline
            sum_with_peer(self.grad_buffer, pipeline, 0 if pipeline.index else pipeline.size - 1)
            self._reduce()
        self._work.wait()
        if self._reducing is not self.grad_buffer:
            self.grad_shard.copy_(self._reducing[self.shard])
        self._work, self._reducing = DONE, self.grad_buffer

    @property
    def grad_shard(self) -> Tensor:
        """This rank's part of the gradient, fp32."""
        return self.grad_buffer[self.shard]

    def start_publish(self) -> Work:
        """Copies the updated masters into the parameters and starts collecting the other ranks' shards."""
        mine = self.param_buffer[self.shard]
        if self.master.data_ptr() != mine.data_ptr():
            mine.copy_(self.master)
        return all_gather_into(self.param_buffer, mine, self.mesh.gradient) if self.level else DONE

    def store(self, entry: Entry, values: Tensor) -> None:
        """Sets a parameter and its master from fp32 values of the parameter's local shape."""
        with torch.no_grad():
            entry.parameter.copy_(values)
            start, stop = self._overlap(entry)
            if start < stop:
                self.master[start - self.shard.start : stop - self.shard.start] = \
                    values.flatten()[start - entry.offset : stop - entry.offset]

    def boxes(self, vector: Tensor) -> Iterator[tuple[ParamSpec, Box, Tensor]]:
        """What `vector`, laid out like this rank's shard, holds of each parameter: views, padding left out."""
        for entry in self.entries:
            start, stop = self._overlap(entry)
            first = start - entry.offset
            for box, position in flat_range_boxes(entry.spec.box, first, stop - entry.offset):
                at = start - self.shard.start + position
                yield entry.spec, box, vector[at : at + box.num_elements].view(box.size)

    def _overlap(self, entry: Entry) -> tuple[int, int]:
        """The part of the bucket that belongs both to the parameter and to this rank's shard."""
        return (max(entry.offset, self.shard.start),
                min(entry.offset + entry.parameter.numel(), self.shard.stop))


def build_buckets(chunks: Iterable[nn.Module], mesh: Mesh, *, level: int, dtype: torch.dtype,
                  reduce_dtype: torch.dtype = torch.float32,
                  bucket_elements: int = DEFAULT_BUCKET_ELEMENTS) -> list[Bucket]:
    """Moves the parameters of this rank's chunks (cut, on the meta device or not) into buckets.

    Buckets never mix chunks, so that each completes when its own chunk does.
    """
    buckets: list[Bucket] = []
    seen: set[nn.Parameter] = set()

    def close(kind: BucketKind, group: list[tuple[nn.Parameter, int]]) -> None:
        if group:
            buckets.append(Bucket(kind, group, mesh, level=level, dtype=dtype, reduce_dtype=reduce_dtype))
            group.clear()

    chunks = list(chunks)
    uses = _count_uses(chunks)
    for chunk in chunks:
        open_groups: dict[BucketKind, list[tuple[nn.Parameter, int]]] = {}
        for parameter in reversed(list(chunk.parameters())):
            if parameter in seen:
                continue
            seen.add(parameter)
            kind = kind_of(spec_of(parameter), mesh, uses[parameter])
            group = open_groups.setdefault(kind, [])
            if group and sum(p.numel() for p, _ in group) + parameter.numel() > bucket_elements:
                close(kind, group)
            group.append((parameter, uses[parameter]))
        for kind, group in open_groups.items():
            close(kind, group)
    return buckets


def _count_uses(chunks: Sequence[nn.Module]) -> dict[nn.Parameter, int]:
    """How many layers of these chunks hold each parameter: two for a tied embedding whose both ends are here."""
    uses: dict[nn.Parameter, int] = {}
    for chunk in chunks:
        for _, parameter in chunk.named_parameters(remove_duplicate=False):
            uses[parameter] = uses.get(parameter, 0) + 1
    return uses
