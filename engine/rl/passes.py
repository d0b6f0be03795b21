"""Forward passes of the roles over a step's rows, and where their numbers go.

Every rank calls these alike.  Where a role lives, its data ranks work through their rows, in the order and the
microbatches of the first epoch; what came out goes, by one move for each role, to the ranks that learn from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.config.placement import ACTOR, CRITIC
from engine.data.sample import Sample
from engine.distributed.collectives import all_reduce
from engine.distributed.mesh import Axis
from engine.model.objective import Measure
from engine.rl.cast import Cast, Member
from engine.rl.move import Move
from engine.rl.objectives import score_at_end
from engine.rl.rollouts import Rollouts
from engine.rl.rows import collated, dealt, of_tokens, owners, plain, with_end
from engine.rl.scores import Numbers
from engine.rl.updates import rows_needed
from engine.train.batches import Microbatches


def measured_tokens(member: Member, rollouts: Rollouts, order: Sequence[int], measure: Measure) -> dict[int, Tensor]:
    """A number for each token of the rows that this rank answers for, by row."""
    mesh = member.state.mesh
    if mesh is None:
        return {}
    rows = dealt(order, member.config, mesh.data.index)
    batches = _batches(member, rows, plain(rollouts, member.config.data.seq_len))
    with member.state.at_work():
        found = member.state.evaluate(batches, measure)
    return of_tokens(found, batches, rows, rollouts, mesh)


def model_scores(member: Member, rollouts: Rollouts, world: Axis) -> Numbers:
    """What a reward model says of every row, on every rank."""
    scores = torch.zeros(rollouts.num_rows, dtype=torch.float64)
    mesh = member.state.mesh
    if mesh is not None:
        rows = dealt(range(rollouts.num_rows), member.config, mesh.data.index)
        with member.state.at_work():
            found = member.state.evaluate(_batches(member, rows, with_end(rollouts, member.config.data.seq_len)),
                                          score_at_end)
        if found is not None and mesh.tensor.index == mesh.context.index == 0:
            for each, numbers in zip(rows, found[:, 0].double().cpu(), strict=True):
                scores[each] = numbers
    all_reduce(scores, world)
    return np.asarray(scores.numpy())


def _batches(member: Member, rows: Sequence[Sequence[int]], sample: Callable[[int], Sample]) -> Microbatches:
    assert member.state.mesh is not None
    return Microbatches(collated(rows, sample, member.config, member.state.mesh), member.state.mesh, member.uses)


class Ways:
    """The moves of a step: from the ranks that answer for rows to those that learn from them."""

    def __init__(self, cast: Cast, rollouts: Rollouts, order: Sequence[int], seed: int, epochs: int,
                 world: Axis) -> None:
        """`order`: of the first epoch."""
        self._cast, self._order, self._world = cast, order, world
        self._lengths = rollouts.lengths
        wanted: list[set[int]] = [set() for _ in range(world.size)]
        for name in (ACTOR, CRITIC):
            if name not in cast:
                continue
            member = cast[name]
            needs = [rows_needed(member, index, seed, rollouts.step, epochs, rollouts.num_rows)
                     for index in range(member.config.parallel.data_size)]
            for rank in member.ranks:
                wanted[rank] |= needs[_data_index(member, rank)]
        self._wanted = [sorted(rows) for rows in wanted]
        answering = owners(cast[ACTOR].ranks, cast[ACTOR].config, order)
        self.home = [row for row, rank in enumerate(answering) if rank == world.index]

    def __call__(self, member: Member, rows: dict[int, Tensor]) -> dict[int, Tensor]:
        """A role's numbers of this rank's rows → those of the rows that are needed here."""
        return Move(owners(member.ranks, member.config, self._order), self._wanted, self._lengths, self._world)(rows)


def _data_index(member: Member, rank: int) -> int:
    """Which data rank of a role a rank of the job belongs to."""
    parallel = member.config.parallel
    return (rank - member.ranks.start) // (parallel.context * parallel.tensor) % parallel.data_size
