"""Flat buckets: the memory in which parameters, gradients and optimizer state live, and ZeRO's four levels.

The parameters of a chunk are laid end to end, in the order in which the backward pass finishes them, into buckets of a
few million elements.  A bucket has

    param_buffer   compute dtype   p₀ p₁ p₂ …        every parameter is a view (`engine.parallel.data.flat`)
    grad_buffer    fp32            g₀ g₁ g₂ …        every `GradSlot` adds into a view
    master         fp32            this rank's shard; the parameter shard itself where that is fp32 already, or where
                                   there are to be no masters and what is written to it is rounded by chance

and the level says what of it stays (Rajbhandari et al. 2020, section 5):

    level   master, moments   gradients                          parameters
    0       whole             whole; all-reduced once            whole
    1       shard             whole; reduce-scattered once       whole; all-gathered after the update
    2       shard             shard; a bucket's buffer lives     whole; all-gathered after the update
                              from its first gradient of a
                              microbatch to its reduction
    3       shard             as 2                               shard; gathered around each use (`streaming`)

With `reproducible`, gradients travel per microbatch at every level, and the owner of a shard does not get their sum but
all of them: it adds them up itself, in the order of the global batch.  Floating-point addition is not associative, so
that is what it takes for a run to be bit-identical on any number of data-parallel ranks.

A reduction starts when the last gradient it waits for has arrived, and runs while the backward pass goes on with the
next bucket.

All parameters of a bucket share whatever decides what happens to them (`BucketKind`), so gradient norm, clipping and
optimizer treat a bucket as one vector.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.distributed.collectives import (
    DONE,
    Work,
    all_gather_into,
    all_reduce,
    all_to_all_into,
    reduce_scatter_into,
)
from engine.distributed.mesh import Mesh
from engine.distributed.random import seed_for
from engine.kernels.rounding import Counted, counted, round_into, signed
from engine.model.projections import is_projection
from engine.model.spec import ParamSpec
from engine.parallel.data.flat import ALIGNMENT, Entry, FlatParameters, allocate, free, is_free
from engine.parallel.gradients import GradSlot, attach_slot


@dataclass(frozen=True)
class BucketKind:
    """What the parameters of a bucket have in common.

    Attributes:
        decay: weight decay applies.
        partial_sum: gradients are summed over the tensor axis first.
        copied: so are parts of them over the ranks that hold copies of these (`ParamSpec.copied`).
        counted: this rank's elements count in the gradient norm (a replica on another rank does not count again).
        tied: an embedding that is also the output layer, on another stage: the two stages sum their gradients.
        matrices: they are the layers' projections, and the optimizer wants these apart from all else.
        narrow: casts of them are gathered (`engine.parallel.data.narrow`).
    """

    decay: bool
    partial_sum: bool
    copied: bool
    counted: bool
    tied: bool
    matrices: bool = False
    narrow: bool = False


def kind_of(spec: ParamSpec, mesh: Mesh, uses: int, matrices_apart: bool = False, narrow: bool = False) -> BucketKind:
    """The bucket kind of a parameter that this rank's chunks use so many times.

    Raises:
        ValueError: others hold a copy, and the mesh was made without the group in which they meet.
    """
    replicated = spec.cut is None and mesh.tensor.index > 0
    tied = spec.tied and uses == 1
    if tied and mesh.ends.size == 1:
        raise ValueError(f"{spec.name} is tied to a copy on another stage; its mesh needs Topology(tied=True)")
    if spec.copies != 1 and mesh.copies.size != spec.copies:
        raise ValueError(f"{spec.name} is copied on {spec.copies} tensor ranks; its mesh needs "
                         f"Topology(copies={spec.copies})")
    return BucketKind(decay=spec.decay, partial_sum=spec.partial_sum, copied=spec.copies > 1,
                      counted=not replicated and not spec.tied_copy,
                      tied=tied, matrices=matrices_apart and is_projection(spec.name), narrow=narrow)


class Bucket(FlatParameters):
    """One flat vector of parameters with its gradient and this rank's shard of the masters."""

    def __init__(self, kind: BucketKind, parameters: Sequence[tuple[nn.Parameter, int]], mesh: Mesh, *, level: int,
                 dtype: torch.dtype, reduce_dtype: torch.dtype, reproducible: bool, reducing: deque[Bucket],
                 rounding: int | None = None) -> None:
        """Moves the parameters (each with its number of uses) into the bucket's memory.

        Args:
            reducing: shared by the buckets of a rank: those whose reduction is under way, oldest first.
            rounding: there are no masters; what new weights are rounded with is drawn from this seed.
        """
        super().__init__(parameters, mesh, level, dtype)
        self.kind, self.reduce_dtype, self.reproducible = kind, reduce_dtype, reproducible
        self.per_microbatch = level >= 2 or reproducible
        self.grad_buffer = torch.zeros(self.param_buffer.numel(), dtype=torch.float32, device=mesh.device)
        self.master = self.param_shard if dtype == torch.float32 or rounding is not None else self.param_shard.float()
        self.ranges = [] if rounding is None or dtype == torch.float32 else [*self._counted(rounding)]
        self.copied = False
        self.grad_shard = self.grad_buffer.new_zeros(self.param_shard.numel()) if self.per_microbatch \
            else self.grad_buffer[self.shard]
        self._slots = [self._attach(entry) for entry in self.entries]
        self._others_reducing = reducing
        self._reduced: Tensor | None = None      # what a reduction under way writes to
        self._reduction: Work = DONE
        self._arrived = self._microbatches = 0
        if level >= 2:
            free(self.grad_buffer)

    def _attach(self, entry: Entry) -> GradSlot:
        """Routes the parameter's gradient here."""
        grad = self._view(self.grad_buffer, entry)
        slot = GradSlot(grad, self._before_contribution, self._after_contribution)
        attach_slot(entry.parameter, slot)
        return slot

    def _gaps(self) -> Iterator[Tensor]:
        """The parts of the gradient buffer that belong to no parameter: they are summed up with the rest."""
        stops = [entry.offset + entry.parameter.numel() for entry in self.entries]
        starts = [*(entry.offset for entry in self.entries[1:]), self.grad_buffer.numel()]
        return (self.grad_buffer[stop:start] for stop, start in zip(stops, starts, strict=True))

    @property
    def num_used(self) -> int:
        """Elements up to the end of the last parameter's place; the padding behind depends on the number of shards."""
        last = self.entries[-1]
        return last.offset + -(-last.parameter.numel() // ALIGNMENT) * ALIGNMENT

    def _counted(self, seed: int) -> Iterator[Counted]:
        """What of the shard are parameters, with the numbers of their elements."""
        for spec, box, view in self.boxes(self.master):
            start = view.storage_offset() - self.master.storage_offset()
            yield counted(spec.shape, box.offset, box.size, start, signed(seed_for(seed, "rounding", spec.name)))

    @property
    def has_own_master(self) -> bool:
        """Whether masters lie elsewhere than what `held` says."""
        return self.master is not self.param_shard or self.kind.narrow

    @property
    def is_first_copy(self) -> bool:
        """Whether no rank before this one holds the same shard."""
        return (self.mesh.replicate if self.level else self.mesh.gradient).index == 0

    # ------------------------------------------------------------------ gradients

    def gradients(self) -> list[Tensor]:
        """What holds gradients between two microbatches, each the whole of its memory."""
        return [*([self.grad_buffer] if self.level < 2 else ()), *([self.grad_shard] if self.per_microbatch else ())]

    def counted_gradient(self) -> Tensor:
        """`grad_shard`, with zeros for what is counted on another tensor rank."""
        if not self.kind.copied or self.mesh.copies.index == 0:
            return self.grad_shard
        counted = self.grad_shard.clone()
        for entry in self.entries:
            first, last = (min(max(entry.offset + edge - self.shard.start, 0), len(counted))
                           for edge in (entry.spec.copied.start, entry.spec.copied.stop))
            counted[first:last] = 0
        return counted

    def begin_step(self, num_microbatches: int) -> None:
        """Expects the gradients of a step."""
        self._arrived, self._microbatches = 0, num_microbatches
        if self.per_microbatch:
            self.grad_shard.zero_()
        for slot in self._slots:
            slot.begin_step()

    def _before_contribution(self) -> None:
        """The buffer must be there, and not be read by a reduction."""
        if self._reduced is not None:
            self._settle()
        if is_free(self.grad_buffer):
            allocate(self.grad_buffer)
            for gap in self._gaps():
                gap.zero_()

    def _after_contribution(self) -> None:
        """Starts the reduction behind the last gradient it needs: of the microbatch, or of the step.

        Zero-bubble schedules may let the next microbatch's first gradients arrive before this one's last; the count is
        then full with a mixture, in which a parameter may be missing; over the step it sums to the same.
        """
        self._arrived += 1
        per_microbatch = sum(entry.uses for entry in self.entries)
        awaited = per_microbatch if self.per_microbatch else per_microbatch * self._microbatches
        if self._arrived % awaited == 0:
            self._start_reduction()

    def _start_reduction(self) -> None:
        """Starts the sum over the ranks that hold the same parameters."""
        for slot in self._slots:
            slot.close()
        if self.kind.partial_sum:
            all_reduce(self.grad_buffer, self.mesh.tensor)
        if self.kind.copied:
            self._sum_copies()
        alone = self.mesh.gradient.size == 1
        buffer = self.grad_buffer if alone else self.grad_buffer.to(self.reduce_dtype)
        if self.reproducible:
            self._reduced, self._reduction = self._collect(buffer)
        elif self.level == 0:
            self._reduced = buffer
            self._reduction = all_reduce(buffer, self.mesh.gradient, asynchronous=True)
        else:
            self._reduced = buffer[self.shard]
            self._reduction = reduce_scatter_into(self._reduced, buffer, self.mesh.shard)
        for slot in self._slots:
            slot.restart()
        while len(self._others_reducing) > 1:      # two at a time: one finishes while the next fills
            self._others_reducing[0]._settle()
        self._others_reducing.append(self)

    def _sum_copies(self) -> None:
        """Adds up the gradients of what is copied over the ranks that hold it."""
        parts = [self.grad_buffer[entry.offset :][entry.spec.copied] for entry in self.entries]
        together = torch.cat(parts)
        all_reduce(together, self.mesh.copies)
        for part, total in zip(parts, together.split([len(part) for part in parts]), strict=True):
            part.copy_(total)

    def _collect(self, buffer: Tensor) -> tuple[Tensor, Work]:
        """Starts bringing together everybody's gradient of this rank's shard: [ranks, shard]."""
        axis = self.mesh.gradient
        if axis.size == 1:
            return buffer.unsqueeze(0), DONE
        everyone = buffer.new_empty(axis.size, self.grad_shard.numel())
        exchange = all_to_all_into if self.level else all_gather_into
        return everyone, exchange(everyone.view(-1), buffer, axis)

    def _settle(self) -> None:
        """Waits for the reduction under way and takes its result over."""
        assert self._reduced is not None
        self._reduction.wait()
        if self.reproducible:
            for gradient in self._reduced:
                self.grad_shard.add_(gradient)
        else:
            if self.level:
                all_reduce(self._reduced, self.mesh.replicate)
            if self.per_microbatch:
                self.grad_shard.add_(self._reduced)
            elif self._reduced.data_ptr() != self.grad_shard.data_ptr():
                self.grad_shard.copy_(self._reduced)
        if self.level >= 2:
            free(self.grad_buffer)
        self._reduced, self._reduction = None, DONE
        self._others_reducing.remove(self)

    def finish_reduction(self) -> None:
        """Waits until `grad_shard` is the sum over all ranks and microbatches.

        Raises:
            RuntimeError: a parameter did not get its gradients, naming it: a schedule or a layer is wrong.
        """
        wrong = [f"{entry.spec.name} ({slot.contributions} of {entry.uses * self._microbatches})"
                 for entry, slot in zip(self.entries, self._slots, strict=True)
                 if slot.contributions != entry.uses * self._microbatches]
        if wrong:
            raise RuntimeError(f"gradients that did not arrive as often as the schedule says: {', '.join(wrong)}")
        if self._reduced is not None:
            self._settle()
        if self.kind.tied:
            all_reduce(self.grad_shard, self.mesh.ends)

    # ------------------------------------------------------------------ parameters

    @property
    def copy(self) -> Tensor | None:
        """This rank's shard of the weights in the compute dtype, where it is no other tensor's job to be that."""
        return None if self.param_shard is self.master else self.param_shard

    def new_moment(self) -> Tensor:
        """Zeros laid out like the masters, fp32."""
        return torch.zeros_like(self.master, dtype=torch.float32)

    def wide_master(self) -> Tensor:
        """The masters, fp32."""
        return self.master.float()

    def write(self, weights: Tensor, skipped: Tensor, updates: Tensor) -> None:
        """Makes these (fp32) the masters, unless the step is skipped; `updates`: that were made before."""
        if self.master.dtype == torch.float32:
            self.master.copy_(torch.where(skipped, self.master, weights))
        else:
            round_into(self.master, torch.where(skipped, self.master.float(), weights), self.ranges, updates + 1)

    def set_master(self, entry: Entry, values: Tensor) -> None:
        """Sets this rank's share of a parameter's master from fp32 values of the parameter's local shape."""
        self.fill(self.master, entry, values)

    def start_publish(self) -> Work:
        """Makes the masters the weights: copies this rank's shard, unless the optimizer has (`copied`), and, up to
        level 2, starts collecting the others'.

        The weights' version rises, whoever wrote them: that is how one knows who has made something of them.
        """
        torch.autograd.graph.increment_version(self.param_buffer)
        if self.copy is not None and not self.copied:
            self.copy.copy_(self.master)
        self.copied = False
        if self.level >= 3:
            self.release()
            return DONE
        return all_gather_into(self.param_buffer, self.param_shard, self.mesh.shard) if self.level else DONE
