"""Which samples a rank trains on, and their tensors.

A step consumes `global` samples, numbers [consumed, consumed + global), or fewer while the batch grows
(`engine.config.length`).  Microbatch m of data rank d takes

    consumed + (m · data + d) · micro + r        r = 0 … micro - 1

so the samples of a step are the same set in every layout, and one integer says where the run stands.  Every rank of a
model replica reads its own copy: the corpora are memory-mapped, and reading costs less than sending.

Whether the divisor is known from shapes alone, or is a sum over ranks, all ranks must see alike, or some would wait for
a sum that others never begin: they settle it in the first step, and a rank on which it changes later ends the run.

*On the host* a step is token ids, masks of labels and boundaries of documents, kilobytes per microbatch.  It is read
while the step before it is computed, and the objective's count, by which the loss is divided, is known before the first
forward pass begins.
*Padding* behind the longest text of a microbatch is computed by nobody: nothing in front of it can see it.  How long
that text is, and so the shape of all that the microbatch sends from rank to rank, every rank of a model replica reads
off the same samples.
*On the device* a microbatch is there from its first forward pass on this rank to its last: among what follows from it
is an attention mask of S × S, and a step has hundreds of microbatches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import lcm

import numpy as np
import torch
from torch import Tensor

from engine.config import Config
from engine.config.length import Ramp, Stage
from engine.data.sample import Sample
from engine.distributed.agree import maximum
from engine.distributed.collectives import all_reduce
from engine.distributed.mesh import Mesh
from engine.errors import DataError
from engine.kernels.documents import Documents
from engine.model.context import Batch, Batches
from engine.model.dropout import token_keys
from engine.model.fields import NOISE
from engine.model.objective import Objective
from engine.parallel.context.zigzag import context_part

Samples = Callable[[int], Sample]          # by number


@dataclass(frozen=True)
class HostBatch:
    """One microbatch of whole sequences on the host.

    Attributes:
        batch: in pinned memory where the device is a GPU.
    """

    batch: Batch

    @property
    def shape(self) -> tuple[int, int]:
        """Length and number of its rows."""
        length, rows = self.batch.tokens_SB.shape
        return length, rows

    def part(self, mesh: Mesh) -> Batch:
        """This rank's part of it, on its device."""
        batch = self.batch.map(lambda _, x: x.to(mesh.device, non_blocking=True))
        if batch.documents is not None:
            batch = replace(batch, documents=batch.documents.to(mesh.device))
        return context_part(batch, mesh.context)


class Microbatches(Batches):
    """The microbatches of a step, each put on the device when it is first asked for and forgotten after its last use.

    Args:
        uses: how often each is asked for: once for every chunk of the model on this rank.
    """

    def __init__(self, host: Sequence[HostBatch], mesh: Mesh, uses: int) -> None:
        self._host, self._mesh, self._uses = host, mesh, uses
        self._there: dict[int, tuple[Batch, int]] = {}

    def __len__(self) -> int:
        return len(self._host)

    def __getitem__(self, index: int) -> Batch:                # type: ignore[override]     # no slices
        there = self._there.pop(index) if index in self._there else None
        batch, left = there or (self._host[index].part(self._mesh), self._uses)
        if left > 1:
            self._there[index] = batch, left - 1
        return batch

    def shape(self, index: int) -> tuple[int, int]:
        length, rows = self._host[index].shape
        return length // self._mesh.context.size, rows


@dataclass(frozen=True)
class HostStep:
    """A data rank's samples of one step.

    Attributes:
        count: the objective's, of all of them; an int where it follows from shapes.
    """

    microbatches: Sequence[HostBatch]
    count: int | float

    @property
    def places(self) -> int:
        """Inputs, padding too."""
        return sum(length * rows for length, rows in (each.shape for each in self.microbatches))


@dataclass(frozen=True)
class StepBatches:
    """This rank's microbatches of one step; the objective's count, the samples and the places on all data ranks."""

    microbatches: Microbatches
    divisor: Tensor | int
    num_samples: int
    places: Tensor | int


def sample_indices(first: int, microbatch: int, config: Config, data_index: int) -> range:
    """Global sample numbers of one microbatch of one data rank, in a step that starts at sample `first`."""
    micro = config.batch.micro
    start = first + (microbatch * config.parallel.data_size + data_index) * micro
    return range(start, start + micro)


class Loader:
    """Steps of a run on one rank; the next one is read in the background.

    Args:
        samples: asked from another thread.
        uses: as of `Microbatches`.
        ahead: read the step after the one that is asked for.
        sizes: of the steps; None: each has `batch.global` samples, as evaluations have while a run's batch grows.
    """

    def __init__(self, samples: Samples, config: Config, mesh: Mesh, objective: Objective, *, uses: int = 1,
                 ahead: bool = False, sizes: Ramp | None = None) -> None:
        self._samples, self._config, self._mesh, self._objective = samples, config, mesh, objective
        self._uses, self._stop, self._multiple = uses, config.num_samples, row_multiple(config)
        self._sizes = sizes or Ramp((Stage(0, config.batch.global_),))
        self._reader = ThreadPoolExecutor(1, "read-ahead", _use_device, (mesh.device,)) if ahead else None
        self._next: tuple[int, Future[HostStep]] | None = None
        self._by_shape: bool | None = None                   # None: not settled yet

    def step(self, first: int) -> StepBatches:
        """The step that starts at sample `first`; every rank must ask for it.

        Raises:
            DataError: a sample cannot be read, or is the first one of the run whose labels do not all count.
        """
        host = self._next[1].result() if self._next is not None and self._next[0] == first else self._read(first)
        following = first + self._sizes.size(first)
        self._next = None
        if self._reader is not None and following < self._stop:
            self._next = following, self._reader.submit(self._read, following)
        microbatches = Microbatches(host.microbatches, self._mesh, self._uses)
        divisor, places = self._everyone(host)
        return StepBatches(microbatches, divisor, following - first, places)

    def close(self) -> None:
        """Reads no further."""
        if self._reader is not None:
            self._reader.shutdown(wait=False, cancel_futures=True)

    def _read(self, first: int) -> HostStep:
        config, pinned = self._config, self._mesh.device.type == "cuda"
        num_microbatches = self._sizes.size(first) // (config.batch.micro * config.parallel.data_size)
        samples = [[self._samples(i) for i in sample_indices(first, m, config, self._mesh.data.index)]
                   for m in range(num_microbatches)]
        microbatches = [collate([row for sample in each for row in (sample, *sample.rest)], self._multiple, pinned)
                        for each in samples]
        counts = [self._objective.count(each.batch) for each in microbatches]
        by_shape = all(isinstance(count, int) for count in counts)
        return HostStep(microbatches, sum(map(int, counts)) if by_shape else float(sum(map(float, counts))))

    def _everyone(self, host: HostStep) -> tuple[Tensor | int, Tensor | int]:
        """Count and places on all data ranks: arithmetic where it is for all of them, else sums (fp32)."""
        count, mesh = host.count, self._mesh
        mine = isinstance(count, int)
        if self._by_shape is None:
            self._by_shape = not maximum([not mine], mesh.world.group)[0]
        if self._by_shape and not mine:
            raise DataError(f"rank {mesh.rank}: a sample says which of its labels count, and none did in the first step"
                            ", so the other ranks divide by all of them: let every sample say it, or none")
        if self._by_shape:
            return int(count) * mesh.data.size, host.places * mesh.data.size
        totals = torch.empty(2, device=mesh.device)
        for total, own in zip(totals, (count, host.places), strict=True):
            total.fill_(own)
        all_reduce(totals, mesh.data)
        return totals[0], totals[1]


def row_multiple(config: Config) -> int:
    """What the rows of a microbatch may be shortened to a multiple of.

    Context ranks take an early and a late piece each, tensor ranks a share of what a context rank has, and products in
    FP8 take tokens by sixteen; the rest is `data.pad_to_multiple`.
    """
    parallel = config.parallel
    tensor = parallel.tensor if parallel.sequence else 1
    on_a_rank = lcm(2 if parallel.context > 1 else 1, tensor * (1 if config.precision.fp8 == "off" else 16))
    return lcm(parallel.context * on_a_rank, config.data.pad_to_multiple)


def collate(rows: Sequence[Sample], multiple: int = 1, pinned: bool = False) -> HostBatch:
    """Samples → one microbatch, sequence first.

    Args:
        multiple: what is left of the rows when the padding that they have in common is cut off; they may be shorter.
    """
    whole = len(rows[0].tokens) - 1
    used = max(1, *(whole if row.used is None else row.used for row in rows))
    length = min(whole, -(-used // multiple) * multiple)
    rows = [_first(row, length) for row in rows] if length < whole else rows
    tokens = torch.from_numpy(np.stack([row.tokens for row in rows], axis=1))
    loss_mask = documents = None
    if any(row.loss_mask is not None for row in rows):
        everywhere = np.ones(length, dtype=bool)
        loss_mask = torch.from_numpy(np.stack([everywhere if row.loss_mask is None else row.loss_mask for row in rows],
                                              axis=1))
    if any(row.document_ids is not None for row in rows):
        one = np.zeros(length, np.int32)                          # a row without ids is one document
        ids = np.stack([one if row.document_ids is None else row.document_ids for row in rows])
        documents = Documents.of(torch.from_numpy(ids))
    extra = {field: torch.from_numpy(np.stack([row.extra[field] for row in rows], axis=field.batch_dim))
             for field in rows[0].extra}
    positions = torch.arange(length).unsqueeze(1) if documents is None else documents.positions()
    batch = Batch(tokens[:-1], positions, tokens[1:], loss_mask, documents=documents, extra=extra, seq_len=whole)
    if pinned:
        batch = replace(batch.map(lambda _, x: x.pin_memory()), documents=documents and documents.pinned())
    return HostBatch(batch)


def _first(row: Sample, length: int) -> Sample:
    """The first so many inputs of a row."""
    def cut(x: np.ndarray | None) -> np.ndarray | None:
        return None if x is None else x[:length]

    extra = {field: x if field.sequence_dim is None else x[:length] for field, x in row.extra.items()}
    return replace(row, tokens=row.tokens[: length + 1], loss_mask=cut(row.loss_mask),
                   document_ids=cut(row.document_ids), extra=extra)


def up_to(samples: Samples, stop: int) -> Samples:
    """The samples before number `stop`; those behind it stand in to fill a step, and count nothing.

    Every sample has a mask then.
    """
    def masked(row: Sample, counts: bool) -> Sample:
        everywhere = np.ones(len(row.tokens) - 1, dtype=bool)
        mask = everywhere if row.loss_mask is None else row.loss_mask
        return replace(row, loss_mask=mask if counts else np.zeros_like(mask),
                       rest=tuple(masked(other, counts) for other in row.rest))

    return lambda index: masked(samples(min(index, stop - 1)), index < stop)


def noisy(samples: Samples, seed: int) -> Samples:
    """The samples, with numbers of their tokens from which random masks are made."""
    def numbered(row: Sample, index: int, place: int) -> Sample:
        keys = token_keys(seed, index, place, len(row.tokens) - 1)
        return replace(row, extra={**row.extra, NOISE: keys})

    def sample(index: int) -> Sample:
        first = samples(index)
        rest = tuple(numbered(row, index, place) for place, row in enumerate(first.rest, 1))
        return replace(numbered(first, index, 0), rest=rest)

    return sample


def _use_device(device: torch.device) -> None:
    """What a thread allocates in pinned memory belongs to its device's context."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
