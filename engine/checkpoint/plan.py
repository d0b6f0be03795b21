"""Who writes what: every box once, however many ranks hold it.

Without ZeRO every data-parallel rank holds the same boxes; layer norms are held alike by all tensor-parallel ranks.
Each rank announces its boxes as 64-bit digests of their names (a few kilobytes), everybody computes the same
assignment: boxes held by several ranks go, largest first, to the holder with the least to write so far.  The
announcement is repeated only when some rank's boxes have changed, which one all-reduce of a few integers finds out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.checkpoint.agree import Group, gather_rows, maximum, rank_in
from engine.distributed.pieces import Piece, tensor_name


@dataclass(frozen=True)
class Agreement:
    """What the ranks settled before a save: its id, whether all can go on, and which of my pieces I write."""

    save_id: str
    all_ready: bool
    steps_agree: bool
    mine: tuple[int, ...]


class Planner:
    """Settles the division of labour and remembers it while the boxes stay the same."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._announced: bytes | None = None
        self._mine: tuple[int, ...] = ()

    def agree(self, step: int, pieces: Sequence[Piece], save_id: int, ready: bool) -> Agreement:
        """Every rank of the group must call this.  `save_id` counts on the first rank only."""
        rows = announce(pieces)
        changed = rows.tobytes() != self._announced
        first = rank_in(self._group) == 0
        any_changed, most, latest, earliest, chosen_id, unready = maximum(
            [changed, len(rows), step, -step, save_id if first else 0, not ready], self._group)
        if any_changed:
            everyone = gather_rows(rows, most, self._group)
            self._mine = assign(everyone)[rank_in(self._group)]
            self._announced = rows.tobytes()
        return Agreement(f"{chosen_id:012x}", not unready, latest == -earliest, self._mine)


def announce(pieces: Sequence[Piece]) -> np.ndarray:
    """`[pieces, 2]`: digest of the box's name, and its bytes."""
    rows = np.zeros((len(pieces), 2), np.int64)
    for row, piece in zip(rows, pieces, strict=True):
        digest = hashlib.blake2b(tensor_name(piece.key, piece.box).encode(), digest_size=8).digest()
        row[:] = int.from_bytes(digest, "little", signed=True), piece.box.num_elements * piece.tensor.dtype.itemsize
    return rows


def assign(everyone: Sequence[np.ndarray]) -> list[tuple[int, ...]]:
    """For each rank the indices of the pieces it writes: each distinct non-empty box exactly once over all ranks.

    Args:
        everyone: by rank, int64 `[pieces, 2]` of digest and bytes.
    """
    counts = [len(rows) for rows in everyone]
    ranks = np.repeat(np.arange(len(everyone)), counts)
    indices = np.concatenate([np.arange(n) for n in counts])
    rows = np.concatenate(list(everyone))
    digests, sizes = rows[:, 0], rows[:, 1]
    order = np.lexsort((indices, ranks, digests))
    order = order[sizes[order] > 0]
    starts = np.flatnonzero(np.r_[True, digests[order][1:] != digests[order][:-1]][:len(order)])
    copies = np.diff(np.r_[starts, len(order)])
    single = order[starts[copies == 1]]
    load = np.bincount(ranks[single], weights=sizes[single], minlength=len(everyone))
    chosen = list(single)
    shared = [order[s:s + n] for s, n in zip(starts[copies > 1], copies[copies > 1], strict=True)]
    for holders in sorted(shared, key=lambda holders: -sizes[holders[0]]):
        best = holders[np.argmin(load[ranks[holders]])]
        load[ranks[best]] += sizes[best]
        chosen.append(best)
    mine: list[list[int]] = [[] for _ in everyone]
    for position in sorted(chosen):
        mine[ranks[position]].append(int(indices[position]))
    return [tuple(part) for part in mine]
