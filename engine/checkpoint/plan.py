"""Who writes what: every tile once, however many ranks hold it.

Without ZeRO every data-parallel rank holds the same tiles; layer norms are held alike by all tensor-parallel ranks.
The ranks tell each other what they hold (`engine.distributed.announce`), and each computes the same division.  Tiles
with the same holders are dealt to them in turn, largest first, there and back: every one gets about its share.  What
was settled is kept while nobody's pieces change, which costs one small agreement per save to find out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from engine.distributed.agree import Group, maximum, rank_in
from engine.distributed.announce import catalogue_of, gather_ledger, ranges_of
from engine.distributed.ledger import Block, Integers, Ledger
from engine.distributed.pieces import Piece


@dataclass(frozen=True)
class Division:
    """Who writes each tile of a layout's ledger: a rank per tile."""

    ledger: Ledger
    writers: Integers

    def of(self, rank: int) -> tuple[int, ...]:
        """The pieces that a rank writes, by their numbers in its own list."""
        ledger = self.ledger
        tile = np.repeat(np.arange(len(ledger)), np.diff(ledger.first))
        mine = np.flatnonzero((ledger.holders == rank) & (self.writers[tile] == rank))
        _, once = np.unique(tile[mine], return_index=True)            # a rank may list a piece twice
        return tuple(map(int, np.sort(ledger.place[mine[once]])))

    def files_for(self, rank: int) -> tuple[str, ...]:
        """The names of the files that hold what a rank holds, whoever writes them."""
        ledger = self.ledger
        tile = np.repeat(np.arange(len(ledger)), np.diff(ledger.first))
        writers = np.unique(self.writers[tile[ledger.holders == rank]])
        return tuple(f"rank-{writer:05d}.safetensors" for writer in writers)

    @cached_property
    def files(self) -> Ledger:
        """The same tiles by the files that hold them: one per rank that writes anything, in order.

        Raises:
            ValueError: some part of a tensor is written by nobody.
        """
        self.ledger.require_all("the ranks")
        _, file = np.unique(self.writers, return_inverse=True)
        tiles = np.arange(len(self.ledger) + 1)
        return Ledger(self.ledger.blocks, self.ledger.block, self.ledger.start, self.ledger.stop, tiles, file, file)


@dataclass(frozen=True)
class Agreement:
    """What the ranks settled before a save: its id, whether all can go on, and which of my pieces I write."""

    save_id: str
    all_ready: bool
    steps_agree: bool
    mine: tuple[int, ...]
    division: Division


class Planner:
    """Settles the division of labour and remembers it while the pieces stay the same."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._announced: tuple[list[Block], bytes] | None = None
        self._mine: tuple[int, ...] = ()
        self._division = divide(Ledger.of([], []))

    def agree(self, step: int, pieces: Sequence[Piece], save_id: int, ready: bool) -> Agreement:
        """Every rank of the group must call this.  `save_id` counts on the first rank only.

        Raises:
            ValueError: ranks disagree about a tensor's shape or type.
        """
        held = catalogue_of(pieces), ranges_of(pieces).tobytes()
        rank = rank_in(self._group)
        any_changed, latest, earliest, chosen_id, unready = maximum(
            [held != self._announced, step, -step, save_id if rank == 0 else 0, not ready], self._group)
        if any_changed:
            self._division = divide(gather_ledger(pieces, self._group))
            self._mine = self._division.of(rank)
            self._announced = held
        return Agreement(f"{chosen_id:012x}", not unready, latest == -earliest, self._mine, self._division)


def divide(ledger: Ledger) -> Division:
    """Gives every tile to one of its holders."""
    copies = np.diff(ledger.first)
    writers = ledger.holders[ledger.first[:-1]].copy()
    shared = np.flatnonzero(copies > 1)
    if len(shared):
        company = _company(ledger)[shared]
        order = shared[np.lexsort((-ledger.num_bytes[shared], company))]
        company = np.sort(company)
        turn = np.arange(len(order)) - np.searchsorted(company, company)       # first, second … of its company
        round_, seat = np.divmod(turn, copies[order])
        seat = np.where(round_ % 2, copies[order] - 1 - seat, seat)
        writers[order] = ledger.holders[ledger.first[order] + seat]
    return Division(ledger, writers)


def _company(ledger: Ledger) -> Integers:
    """A number per tile that is the same for tiles with the same holders: a sum of their hashes."""
    mixed = (ledger.holders.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return np.add.reduceat(mixed ^ (mixed >> np.uint64(32)), ledger.first[:-1]).view(np.int64)
