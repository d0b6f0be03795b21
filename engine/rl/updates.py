"""An update of a role from a minibatch of rows, and the order in which an epoch goes through them.

The order is a permutation that only (seed, step, epoch) names, so that a minibatch holds the same rows in every layout.
Old log-probabilities and values are computed in the order of the first epoch, in microbatches of the same rows as those
that are trained; the very same kernels then see the very same batches, and the first ratio is 1 to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.data.sample import Sample
from engine.distributed.collectives import all_reduce
from engine.distributed.random import generator_for
from engine.optim.gradients import StepSums
from engine.rl.cast import Member
from engine.rl.rows import collated, dealt
from engine.train.batches import HostBatch, Microbatches


def order_of(seed: int, step: int, epoch: int, num_rows: int) -> list[int]:
    """The rows in the order of an epoch of a step, counted from 0."""
    order: list[int] = torch.randperm(num_rows, generator=generator_for(seed, "epoch", step, epoch)).tolist()
    return order


def minibatches(seed: int, step: int, epochs: int, size: int, num_rows: int) -> Iterator[list[int]]:
    """The rows of every update of a step, in turn."""
    for epoch in range(epochs):
        order = order_of(seed, step, epoch, num_rows)
        yield from (order[first : first + size] for first in range(0, num_rows, size))


def rows_needed(member: Member, data_index: int, seed: int, step: int, epochs: int, num_rows: int) -> set[int]:
    """What a data rank of a role that is trained needs in a step."""
    return {row for epoch in range(epochs)
            for rows in dealt(order_of(seed, step, epoch, num_rows), member.config, data_index) for row in rows}


@dataclass(frozen=True)
class Update:
    """What became of a minibatch, on the device: sums over everybody, and the count they are divided by."""

    totals: StepSums
    divisor: Tensor


def update(member: Member, rows: Sequence[int], sample: Callable[[int], Sample], lr: float,
           agree: Callable[[Update], bool] = lambda _: True,
           more: Callable[[float], Sequence[HostBatch]] | None = None) -> tuple[Update, bool] | None:
    """One update; None where the role does not live.

    Args:
        rows: of the minibatch, in its order, the same on every rank.
        agree: asked before the weights change, with numbers that all ranks of the role have alike; False: they stay.
        more: microbatches besides those of the rows, which count nothing, of what the rows' sums are divided by.

    Returns:
        What became of it, and whether the weights changed, as far as `agree` is concerned.
    """
    state = member.state
    if state.mesh is None or state.model is None:
        return None
    host = collated(dealt(rows, member.config, state.mesh.data.index), sample, member.config, state.mesh)
    count = sum(float(state.role.objective.count(each.batch)) for each in host)
    divisor = torch.full((), count, dtype=torch.float32, device=state.mesh.device)
    all_reduce(divisor, state.mesh.data)
    host += [] if more is None else more(float(divisor))
    own = state.forward_backward(Microbatches(host, state.mesh, member.uses), 1 / divisor.clamp(min=1))
    totals = state.totals(own)
    assert totals is not None
    done = Update(totals, divisor)
    if not agree(done):
        return done, False
    state.update(lr, totals, divisor)
    state.publish()
    return done, True
