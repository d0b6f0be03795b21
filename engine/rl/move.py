"""Moving rows of a batch, of unequal lengths, from the ranks that have computed them to the ranks that need them.

A role computes numbers per token for the rows of its data ranks; another needs them for the rows of its own.  Who owns
a row, who wants it and how long it is, every rank can work out by itself, so nothing is announced: each packs what the
others want of its rows, end to end, and one all-to-all carries all of it, each number to each rank that needs it once.

    owners    the rank that has row r                              the same list on every rank
    wanted    the rows that a rank needs, by rank                  the same on every rank
    lengths   the numbers of row r

A row stays where it is owned, too, if that rank wants it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from engine.distributed.agree import gather_bytes
from engine.distributed.collectives import exchange
from engine.distributed.mesh import Axis
from engine.rl.rollouts import Response


class Move:
    """The way of a step's rows from one role to others."""

    def __init__(self, owners: Sequence[int], wanted: Sequence[Sequence[int]], lengths: Sequence[int],
                 world: Axis) -> None:
        """
        Args:
            wanted: by rank; no row twice.
            world: all ranks of the job; every one of them makes the move.
        """
        self._world, self._lengths, mine = world, lengths, world.index
        self._wanted = list(wanted[mine])
        self._sends = [[row for row in rows if owners[row] == mine] for rows in wanted]
        self._receives = [[row for row in self._wanted if owners[row] == rank] for rank in range(world.size)]

    @property
    def bytes_received(self) -> int:
        """Of one number per token, from other ranks."""
        return 4 * sum(self._lengths[row] for rank, rows in enumerate(self._receives) if rank != self._world.index
                       for row in rows)

    def __call__(self, rows: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The wanted rows.

        Args:
            rows: those that this rank owns, fp32 on the CPU, one-dimensional.
        """
        outgoing = torch.cat([rows[row] for each in self._sends for row in each] or [torch.empty(0)])
        sent = [self._total(each) for each in self._sends]
        received = [self._total(each) for each in self._receives]
        incoming = outgoing.clone() if self._world.size == 1 else torch.empty(sum(received))
        exchange(incoming, outgoing, self._world, received, sent)
        order = [row for each in self._receives for row in each]
        parts = incoming.split([self._lengths[row] for row in order]) if order else ()
        return dict(zip(order, parts, strict=True))

    def _total(self, rows: Sequence[int]) -> int:
        return sum(self._lengths[row] for row in rows)


def shared_responses(own: Mapping[int, Response], num_rows: int, world: Axis) -> list[Response]:
    """Everybody's texts, by row, on every rank.

    Raises:
        ValueError: a row was made by nobody, or by two.
    """
    said = json.dumps([[row, [*each.tokens], each.ended, [*each.log_probs]] for row, each in own.items()]).encode()
    found: dict[int, Response] = {}
    for part in gather_bytes(said, world.group):
        for row, tokens, ended, log_probs in json.loads(part):
            if row in found:
                raise ValueError(f"row {row} was made twice")
            found[row] = Response(tuple(tokens), ended, tuple(log_probs))
    if missing := [row for row in range(num_rows) if row not in found]:
        raise ValueError(f"rows {missing[:5]} were made by nobody")
    return [found[row] for row in range(num_rows)]
