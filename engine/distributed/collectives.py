"""Collectives along a mesh axis.

They are thin: they skip the call on an axis of size one, and those that start something return its handle.  Every
operation on an axis's group is one that all its members take part in; only the pipeline's messages (`pipeline/p2p`) go
between two.

On an axis that is `checked` every collective first compares what the ranks bring.  gloo does not: given different sizes
it returns wrong sums without an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.distributed.mesh import Axis
from engine.distributed.waits import Timed

# torch.distributed offers no public type for what an asynchronous collective returns across its versions.
Work = Any


class _Done:
    """The handle of a collective that had nothing to do."""

    def wait(self) -> None:
        """Returns at once."""


DONE = _Done()

CHECK_BYTES = 96      # of the description that checked ranks exchange

# torch 2.13 renamed these two and warns about the old names; 2.11 has only the old ones.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class CollectiveMismatch(RuntimeError):
    """The ranks of an axis are not doing the same thing."""


def _check(operation: str, x: Tensor, axis: Axis) -> None:
    """On a checked axis: raises, on every rank of it, if the ranks bring different operations, shapes or dtypes."""
    if not axis.checked or axis.size == 1:
        return
    mine = f"{operation} of {str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
    text = torch.zeros(CHECK_BYTES, dtype=torch.uint8)
    encoded = torch.frombuffer(bytearray(mine.encode()[:CHECK_BYTES]), dtype=torch.uint8)
    text[: len(encoded)] = encoded
    everyone = text.new_empty(axis.size * CHECK_BYTES).to(x.device)
    _all_gather_single(everyone, text.to(x.device), group=axis.group)
    said = [bytes(row.tolist()).rstrip(b"\0").decode() for row in everyone.cpu().view(axis.size, CHECK_BYTES)]
    if len(set(said)) > 1:
        lines = "\n  ".join(f"rank {rank}: {what}" for rank, what in zip(axis.ranks, said, strict=True))
        raise CollectiveMismatch(f"the ranks of the {axis.name} axis do not agree on a collective:\n  {lines}")


def started(work: Work, axis: Axis) -> Work:
    """The handle of what was started along an axis; waiting for it counts as such."""
    return work if work is None or axis.waits is None else Timed(work, axis.waits)


def _now(call: Callable[[], Any], axis: Axis) -> Any:
    """Calls what waits for the other ranks itself."""
    return call() if axis.waits is None else axis.waits.during(call)


def all_gather_into(out: Tensor, x: Tensor, axis: Axis) -> Work:
    """Starts filling `out` [size·n, …] with the ranks' `x` [n, …]; `x` may be this rank's part of `out`."""
    _check("all-gather", x, axis)
    return DONE if axis.size == 1 else started(_all_gather_single(out, x, group=axis.group, async_op=True), axis)


def reduce_scatter_into(out: Tensor, x: Tensor, axis: Axis) -> Work:
    """Starts summing this rank's part of `x` [size·n, …] into `out` [n, …], which may be that part of `x`."""
    _check("reduce-scatter", x, axis)
    return DONE if axis.size == 1 else started(_reduce_scatter_single(out, x, group=axis.group, async_op=True), axis)


def all_reduce(x: Tensor, axis: Axis, *, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
               asynchronous: bool = False) -> Work:
    """Sums `x` over the axis in place."""
    if axis.size == 1:
        return DONE
    _check("all-reduce", x, axis)
    if asynchronous:
        return started(dist.all_reduce(x, op=op, group=axis.group, async_op=True), axis)
    return _now(lambda: dist.all_reduce(x, op=op, group=axis.group), axis) or DONE


def broadcast(x: Tensor, axis: Axis, index: int, *, asynchronous: bool = False) -> Work:
    """Overwrites `x` with that of the rank at `index` along the axis."""
    if axis.size == 1:
        return DONE
    if asynchronous:
        return started(dist.broadcast(x, axis.ranks[index], group=axis.group, async_op=True), axis)
    return _now(lambda: dist.broadcast(x, axis.ranks[index], group=axis.group), axis) or DONE


def all_to_all_into(out: Tensor, x: Tensor, axis: Axis) -> Work:
    """Starts sending part i of `x` (dimension 0, equal parts) to rank i; `out` gets what they send, by rank."""
    if axis.size == 1:
        out.copy_(x)
        return DONE
    _check("all-to-all", x, axis)
    return started(dist.all_to_all_single(out, x, group=axis.group, async_op=True), axis)


def exchange(out: Tensor, x: Tensor, axis: Axis, received: list[int], sent: list[int]) -> None:
    """Sends `sent[i]` elements of the one-dimensional `x` to rank i; `out` gets `received[i]` from it, by rank."""
    if axis.size > 1:
        _now(lambda: dist.all_to_all_single(out, x, received, sent, group=axis.group), axis)


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """Concatenates the ranks' `x` along dimension 0: [n, …] → [size·n, …]."""
    out, work = start_all_gather(x, axis)
    work.wait()
    return out


def start_all_gather(x: Tensor, axis: Axis) -> tuple[Tensor, Work]:
    """As `all_gather`, returning the output (valid after `wait`) and the handle."""
    if axis.size == 1:
        return x, DONE
    x = x.contiguous()
    out = x.new_empty((axis.size * x.shape[0], *x.shape[1:]))
    return out, all_gather_into(out, x, axis)


def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """Sums over the ranks and keeps this rank's part of dimension 0: [size·n, …] → [n, …]."""
    out, work = start_reduce_scatter(x, axis)
    work.wait()
    return out


def start_reduce_scatter(x: Tensor, axis: Axis) -> tuple[Tensor, Work]:
    """As `reduce_scatter`, returning the output (valid after `wait`) and the handle."""
    if axis.size == 1:
        return x, DONE
    x = x.contiguous()
    out = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    return out, reduce_scatter_into(out, x, axis)


class RingShift:
    """A tensor on its way round the ring."""

    def __init__(self, arriving: Tensor, work: list[Work]) -> None:
        self._arriving, self._work = arriving, work

    def wait(self) -> Tensor:
        """The previous rank's tensor."""
        for work in self._work:
            work.wait()
        return self._arriving


def start_ring_shift(x: Tensor, axis: Axis, tag: int = 0) -> RingShift:
    """Starts sending `x` to the next rank of the axis and receiving the previous one's, of the same shape.

    Shifts that are under way at the same time need different tags.
    """
    if axis.size == 1:
        return RingShift(x, [])
    x, arriving = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    _check("ring shift", x, axis)
    following, previous = axis.ranks[(axis.index + 1) % axis.size], axis.ranks[axis.index - 1]
    works = dist.batch_isend_irecv([dist.P2POp(dist.isend, x, following, axis.group, tag),
                                    dist.P2POp(dist.irecv, arriving, previous, axis.group, tag)])
    return RingShift(arriving, [started(work, axis) for work in works])


def my_part(x: Tensor, axis: Axis) -> Tensor:
    """This rank's equal part of dimension 0."""
    return x if axis.size == 1 else x.chunk(axis.size, dim=0)[axis.index]
