"""Adafactor (Shazeer and Stern 2018): second moments of a matrix as one number per row and one per column.

    R = β₂·R + (1 − β₂)·(mean of g² over columns + ε₁)        C = the same of rows          β₂ = 1 − k^−0.8, k: update
    u = g / √(R·C / mean(R))        u = u / max(1, RMS(u))        w = (1 − lr·λ)·w − lr·max(ε₂, RMS(w))·u

Vectors keep a number for each element.  With `optim.momentum` the last term is averaged over updates, which takes a
number per weight; without, next to nothing is kept: 65 billion weights have 20 million rows and columns.

All of it is of whole matrices, those that a model has (`engine.model.projections`), and a rank holds a flat range of
its slice of one.  But only sums are needed of what others hold, over rows, columns and all: of g² and w², then of u².
They are made of the range, and added up over shards (ZeRO) and, along the dimension that is cut, over tensor ranks; so
R and C lie with every rank that holds the slice, and a step takes two small reductions for each bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import OptimConfig
from engine.distributed.boxes import Box
from engine.distributed.collectives import all_reduce
from engine.distributed.pieces import Piece
from engine.kernels.table import Operations
from engine.model.projections import fused_in
from engine.model.spec import ParamSpec
from engine.optim.optimizer import Now, Optimizer, as_it_is
from engine.parallel.data.buckets import Bucket
from engine.parallel.data.flat import Entry

DECAY_EXPONENT = -0.8                       # of the share of a new g²: 1 at first
TINY, SMALLEST_RMS = 1e-30, 1e-3            # ε₁, ε₂


@dataclass(frozen=True)
class Slice:
    """This rank's range of a parameter, in whole rows of its slice of it; of a vector each element is a row.

    Attributes:
        spec: of the parameter.
        range: in the bucket's shard.
        rows: those that the range touches.
        before: elements of the first of them in front of the range.
        belongs: [all rows of the slice, matrices]: 1 where a row is of a matrix, else 0.
        counted: the same without rows that another tensor rank counts (`ParamSpec.copied`).
        sizes: elements of each matrix, of all ranks, padding excluded.
        width: columns here.
        of_rows: the moment R, [rows of the slice]; None: it is a vector.
        of_columns: the moment C, [matrices, width]; likewise.
    """

    spec: ParamSpec
    range: slice
    rows: slice
    before: int
    belongs: Tensor
    counted: Tensor
    sizes: Tensor
    width: int
    of_rows: Tensor | None
    of_columns: Tensor | None

    @staticmethod
    def of(bucket: Bucket, entry: Entry) -> Slice:
        """Of a parameter in a bucket, with moments of zero."""
        spec, (start, stop) = entry.spec, bucket.overlap(entry)
        start, stop = (start, stop) if start < stop else (entry.offset, entry.offset)
        shape, device = spec.local_shape, bucket.master.device
        width = shape[-1] if spec.decay else 1
        outside = shape[:-1] if spec.decay else shape
        fused = fused_in(spec.name)
        sizes = [spec.num_elements // spec.shape[fused.dim] * length
                 for _, _, length in fused.rows(spec.shape[fused.dim])]
        belongs = []
        for _, first, length in fused.rows(outside[fused.dim]):
            of = torch.zeros(outside, device=device)
            of.narrow(fused.dim, first, length).fill_(1.0)
            belongs.append(of.flatten())
        of_which = torch.stack(belongs, dim=1)
        counted = of_which.clone()
        if spec.copy_index:
            counted[spec.copied.start // width : spec.copied.stop // width] = 0
        first_row, last_row = (start - entry.offset) // width, -(-(stop - entry.offset) // width)
        moments = (torch.zeros(prod(outside), device=device), torch.zeros(len(sizes), width, device=device)) \
            if spec.decay else (None, None)
        return Slice(spec, slice(start - bucket.shard.start, stop - bucket.shard.start), slice(first_row, last_row),
                     (start - entry.offset) - first_row * width, of_which, counted,
                     torch.tensor(sizes, dtype=torch.float32, device=device), width, *moments)

    @property
    def whole_rows(self) -> bool:
        """Tensor ranks divide the rows, or nothing: every row is whole on the ranks that share this slice."""
        return self.spec.cut is None or self.spec.cut.dim < len(self.spec.shape) - 1

    def in_rows(self, shard: Tensor) -> Tensor:
        """The range of a vector laid out like the bucket's shard: [rows, width], zeros where it is not here."""
        values = shard[self.range]
        behind = (self.rows.stop - self.rows.start) * self.width - self.before - len(values)
        return F.pad(values, (self.before, behind)).view(-1, self.width)

    def from_rows(self, rows: Tensor) -> Tensor:
        """What `in_rows` made, as it was."""
        return rows.flatten()[self.before : self.before + self.range.stop - self.range.start]

    def by_matrix(self, of_rows: Tensor) -> Tensor:
        """Numbers [rows of the range] added up: [matrices]."""
        return of_rows @ self.counted[self.rows]

    def pieces(self, prefix: str, now: Now) -> list[Piece]:
        """The moments of rows and columns."""
        if self.of_rows is None or self.of_columns is None:
            return []
        spec, (box, _) = self.spec, self.spec.held[0]
        rows = now(self.of_rows).view(spec.local_shape[:-1])
        matrices, columns = self.of_columns.shape[0], spec.shape[-1]
        return [*(Piece(f"{prefix}.exp_avg_sq_row.{spec.name}", spec.shape[:-1], Box(its.offset[:-1], its.size[:-1]),
                        rows[place.slices[:-1]]) for its, place in spec.held),
                Piece(f"{prefix}.exp_avg_sq_col.{spec.name}", (matrices, columns),
                      Box((0, box.offset[-1]), (matrices, box.size[-1])), now(self.of_columns))]


class Adafactor(Optimizer):
    """See the module docstring."""

    def __init__(self, buckets: Sequence[Bucket], config: OptimConfig, operations: Operations) -> None:
        super().__init__(buckets, config, operations)
        vectors = {i: bucket.new_moment() for i, bucket in enumerate(buckets) if not bucket.kind.decay}
        averages = {i: bucket.new_moment() for i, bucket in enumerate(buckets)} if config.momentum else {}
        self.moments = {"exp_avg_sq": vectors, "exp_avg": averages}
        self.slices = [[Slice.of(bucket, entry) for entry in bucket.entries] for bucket in buckets]

    @torch.no_grad()
    def step(self, lr: float, grad_divisor: Tensor, found_inf: Tensor) -> None:
        """As `Optimizer.step`."""
        for i, bucket in enumerate(self.buckets):
            self._update(i, bucket, lr, bucket.grad_shard / grad_divisor, found_inf.bool())
            self.steps[i].add_(1 - found_inf)

    def _update(self, i: int, bucket: Bucket, lr: float, gradient: Tensor, skipped: Tensor) -> None:
        slices = self.slices[i]
        share = (self.steps[i] + 1) ** DECAY_EXPONENT
        squares = [Sums.of(each, gradient, bucket.wide_master()) for each in slices]
        add_up(bucket, slices, squares)

        def follow(moment: Tensor, latest: Tensor) -> Tensor:
            """The moment with what is new in it, kept unless the step is skipped."""
            new = moment.lerp(latest + TINY, share)
            moment.copy_(torch.where(skipped, moment, new))
            return new

        update = torch.zeros_like(gradient)
        if not bucket.kind.decay:
            torch.mul(gradient, follow(self.moments["exp_avg_sq"][i], gradient.square()).rsqrt_(), out=update)
        for each, sums in zip(slices, squares, strict=True):
            if each.of_rows is not None and each.of_columns is not None:
                rows = follow(each.of_rows, sums.rows / each.spec.shape[-1])
                columns = follow(each.of_columns, sums.columns / (each.sizes / each.spec.shape[-1]).unsqueeze(1))
                update[each.range] = each.from_rows(each.in_rows(gradient) * inverse_root(each, rows, columns))
        of_updates = [Sums.of_all(each, update) for each in slices]
        add_up(bucket, slices, of_updates)
        for each, sums, squared in zip(slices, squares, of_updates, strict=True):
            rms = (sums.all / each.sizes).sqrt_().clamp_(min=SMALLEST_RMS)
            size = lr * rms / (squared.all / each.sizes).sqrt_().clamp_(min=1.0)
            update[each.range] = each.from_rows(each.in_rows(update) * (each.belongs[each.rows] @ size).unsqueeze(1))
        if self.config.momentum:
            average = self.moments["exp_avg"][i]
            update = average.lerp(update, 1 - self.config.momentum)
            average.copy_(torch.where(skipped, average, update))
        changed = bucket.wide_master() * (1 - lr * self.decay_of(bucket)) - update
        bucket.write(changed, skipped, self.steps[i])

    def pieces(self, prefix: str, now: Now = as_it_is) -> list[Piece]:
        """As `Optimizer.pieces`."""
        return [*super().pieces(prefix, now), *(piece for of_bucket in self.slices for each in of_bucket
                                                for piece in each.pieces(prefix, now))]

    def state(self) -> list[Tensor]:
        """As `Optimizer.state`."""
        return [*super().state(), *(moment for of_bucket in self.slices for each in of_bucket
                                    for moment in (each.of_rows, each.of_columns) if moment is not None)]


def inverse_root(of: Slice, rows: Tensor, columns: Tensor) -> Tensor:
    """1 / √(R·C / mean(R)) of the rows of the range, [rows, width].

    The mean over rows is that over columns; one of the two is of numbers that all are here.
    """
    if of.whole_rows and of.spec.cut is not None:
        mean = columns.mean(1)
    else:
        mean = (rows @ of.belongs) / (of.sizes / of.spec.shape[-1])
    belongs = of.belongs[of.rows]
    return (rows[of.rows] / (belongs @ mean)).rsqrt_().unsqueeze(1) * (belongs @ columns.rsqrt())


@dataclass(frozen=True)
class Sums:
    """Of squares, over the range of a `Slice`.

    Attributes:
        rows: [all rows of the slice]; empty where they are not asked for.
        columns: [matrices, width]; likewise.
        all: [matrices].
    """

    rows: Tensor
    columns: Tensor
    all: Tensor

    @staticmethod
    def of_all(each: Slice, values: Tensor) -> Sums:
        """The sum over everything alone."""
        return Sums(values[:0], values[:0], each.by_matrix(each.in_rows(values).square().sum(1)))

    @staticmethod
    def of(each: Slice, gradient: Tensor, weights: Tensor) -> Sums:
        """Rows and columns of the gradient's squares, where it is a matrix; all of the weights'."""
        total = Sums.of_all(each, weights)
        if each.of_rows is None:
            return total
        squares = each.in_rows(gradient).square()
        rows = torch.zeros_like(each.of_rows)
        rows[each.rows] = squares.sum(1)
        return Sums(rows, each.counted[each.rows].T @ squares, total.all)


def add_up(bucket: Bucket, slices: Sequence[Slice], sums: Sequence[Sums]) -> None:
    """Sums over this rank's ranges → over the matrices, in place; every rank that shares the bucket must call this."""
    mesh = bucket.mesh
    along = [[tensor for each, own in zip(slices, sums, strict=True) for tensor in choose(each, own)]
             for choose in (_divided, _here)]
    nothing = bucket.grad_shard[:0]
    flat = [torch.cat([tensor.flatten() for tensor in tensors]) if tensors else nothing for tensors in along]
    if bucket.level:
        both = torch.cat(flat)
        all_reduce(both, mesh.shard)
        all_reduce(both, mesh.replicate)                   # copies stay equal, whatever each summed up first
        flat = [*both.div_(mesh.replicate.size).split([len(each) for each in flat])]
    all_reduce(flat[0], mesh.tensor)
    for tensors, values in zip(along, flat, strict=True):
        if bucket.kind.tied:
            all_reduce(values, mesh.ends)
            values.div_(mesh.ends.size)
        for tensor, total in zip(tensors, values.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view(tensor.shape))


Choice = Callable[[Slice, Sums], Sequence[Tensor]]


def _divided(each: Slice, own: Sums) -> Sequence[Tensor]:
    """What tensor ranks have parts of."""
    if each.spec.cut is None:
        return ()
    return (own.columns if each.whole_rows else own.rows, own.all)


def _here(each: Slice, own: Sums) -> Sequence[Tensor]:
    """What they have not."""
    if each.spec.cut is None:
        return (own.rows, own.columns, own.all)
    return (own.rows if each.whole_rows else own.columns,)
