"""Moving live tensors from one layout to another: actor weights into a rollout layout, a reference brought up to date.

    reshard = Reshard.plan(source, target, mesh)      # worked out once, while nobody's pieces change
    reshard.run(source, target)                       # as often as wanted

Both layouts are lists of pieces, so they may be anything that pieces can be: other degrees, ranks that are disjoint or
overlap, shards of ZeRO.  Where the ledgers of the two overlap is what moves (`engine.distributed.ledger`, which is also
how a checkpoint is read).  A rank copies what it holds itself and receives the rest, each element once: the bytes are
the least that the two layouts imply.  Where several ranks hold a copy, receivers are dealt to them in turn.

*In rounds.*  A whole model must not lie in buffers.  The tensors are walked through in grains, boxes small enough that
no rank sends or receives more than a buffer for one of them, and a round takes as many grains as fit.  What every rank
sends and receives for a grain only it knows, so the ranks agree on the largest; all then cut the same rounds.  A round
is one all-to-all, an operation of the whole group, whatever each rank has to say in it.

*Changes only.*  With `delta` a rank remembers what it has sent, and from the second time on sends the elements whose
bits are others (`engine.distributed.changes`).  That takes as much memory again as the pieces that it sends from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from engine.distributed.agree import maximum
from engine.distributed.announce import gather_ledger
from engine.distributed.boxes import Box
from engine.distributed.changes import apply, encode, places_of_changes, size_of_changes
from engine.distributed.collectives import exchange
from engine.distributed.ledger import Ledger
from engine.distributed.mesh import Axis, Mesh
from engine.distributed.pieces import Piece

BUCKET_BYTES = 64 << 20
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}      # values move as integers of their width


class Transfer(NamedTuple):
    """`region` of a tensor goes to, or comes from, `peer`; here it is part of the piece of that number."""

    key: str
    region: Box
    peer: int
    piece: int


class LocalCopy(NamedTuple):
    """`region` of one's own source piece goes to one's own target piece."""

    region: Box
    source: int
    target: int


@dataclass(frozen=True)
class Routes:
    """What one rank has to do, and nothing else."""

    local: list[LocalCopy]
    sends: list[Transfer]
    receives: list[Transfer]


def routes(source: Ledger, target: Ledger, rank: int) -> Routes:
    """The part of a rank, by arithmetic alone.

    Raises:
        ValueError: the target has a tensor that the source lacks, or of another shape or type; or the source's tiles
            do not make up each tensor exactly once, copies aside.
    """
    _require_fit(source, target)
    own = _own(source, rank)
    local: list[LocalCopy] = []
    receives: list[Transfer] = []
    for tile, piece in _own(target, rank).items():
        key = target.blocks[target.block[tile]].key
        for box in target.boxes(tile):
            for origin, region in source.overlapping(key, box):
                if origin in own:
                    local.append(LocalCopy(region, own[origin], piece))
                else:
                    receives.append(Transfer(key, region, _giver(source, origin, rank), piece))
    sends = [Transfer(key, region, receiver, own[tile])
             for tile in own for key, region, receiver in _wanted_of(source, target, tile)
             if _giver(source, tile, receiver) == rank]
    return Routes(local, sends, receives)


def _own(ledger: Ledger, rank: int) -> dict[int, int]:
    """The tiles that a rank holds, and the numbers of its pieces."""
    rows = (ledger.holders == rank).nonzero()[0]
    tiles = ledger.first.searchsorted(rows, side="right") - 1
    return {int(tile): int(ledger.place[row]) for tile, row in zip(tiles, rows, strict=True)}


def _giver(source: Ledger, tile: int, receiver: int) -> int:
    """Which of a tile's holders serves a receiver that has none of it."""
    holders = source.holders_of(tile)
    return int(holders[(receiver + tile) % len(holders)])


def _wanted_of(source: Ledger, target: Ledger, tile: int) -> Iterator[tuple[str, Box, int]]:
    """What of a source tile goes to whom: to those who hold a target tile there and do not hold this one."""
    key = source.blocks[source.block[tile]].key
    if key not in target.keys:
        return
    have = set(source.holders_of(tile).tolist())
    for box in source.boxes(tile):
        for there, region in target.overlapping(key, box):
            for receiver in target.holders_of(there).tolist():
                if receiver not in have:
                    yield key, region, receiver


def _require_fit(source: Ledger, target: Ledger) -> None:
    held = source.elements_held()
    for key in target.keys:
        if key not in source.keys or source.kind(key) != target.kind(key):
            there = source.kind(key) if key in source.keys else "not there"
            raise ValueError(f"{key} is {target.kind(key)} in the target layout, in the source it is {there}")
        if held[key] != prod(source.kind(key)[1]):
            raise ValueError(f"{key}: the source's tiles hold {held[key]:,} elements of {prod(source.kind(key)[1]):,}")


@dataclass(frozen=True)
class Round:
    """One all-to-all: what this rank packs and unpacks, by peer, and how many bytes that is for each."""

    sends: list[Transfer]
    receives: list[Transfer]
    sent: list[int]
    received: list[int]
    itemsize: int


class Reshard:
    """The way from one layout to another, on one rank.

    Attributes:
        bytes_received: what this rank gets from others each time; the most that it gets where only changes are sent.
        num_rounds: all-to-alls each time, the same on every rank.
    """

    def __init__(self, axis: Axis, local: list[LocalCopy], rounds: list[Round], delta: bool = False) -> None:
        self._axis, self._local, self._rounds, self._delta = axis, local, rounds, delta
        self._sent: dict[int, Piece] = {}                    # copies of pieces as they were sent, by number
        self._is_first = True
        self.bytes_received = sum(sum(one.received) for one in rounds)
        self.num_rounds = len(rounds)

    @staticmethod
    def plan(source: Sequence[Piece], target: Sequence[Piece], mesh: Mesh, bucket_bytes: int = BUCKET_BYTES,
             delta: bool = False) -> Reshard:
        """Every rank of the mesh must call this, with no pieces where it holds none.

        Args:
            mesh: over all ranks that hold anything of either; one that is only data-parallel (`Topology(data=n)`).
            bucket_bytes: of each of the two buffers.  A single element may need more.
            delta: send what has changed since the last run.  Nobody else may then write to the target.

        Raises:
            ValueError: see `routes`; on every rank.
        """
        group = mesh.world.group
        before, after = gather_ledger(source, group), gather_ledger(target, group)
        own = routes(before, after, mesh.rank)
        sizes = {key: int(after.itemsizes[numbers.start]) for key, numbers in after.keys.items()}
        shapes = {key: after.kind(key)[1] for key in after.keys}
        grains = _grains(own, sizes, shapes, bucket_bytes, lambda values: maximum(values, group))
        rounds = [_round(own, grains_of, mesh.data.size, sizes) for grains_of in _batches(grains, sizes, bucket_bytes)]
        return Reshard(mesh.data, own.local, rounds, delta)

    @torch.no_grad()
    def run(self, source: Sequence[Piece], target: Sequence[Piece]) -> int:
        """Brings the target's tensors up to date with the source's.  Every rank of the mesh must call this.

        The pieces are those of the plan, in the same order; their tensors may be others.

        Returns:
            The bytes of values that this rank has received.
        """
        for region, origin, goal in self._local:
            target[goal].view(region).copy_(source[origin].view(region))
        device = next((piece.tensor.device for piece in (*source, *target)), torch.device("cpu"))
        if self._delta and not self._is_first:
            received = sum(self._send_changes(one, source, target, device) for one in self._rounds)
        else:
            self._send_all(source, target, device)
            received = self.bytes_received
        self._remember(source)
        return received

    def _send_all(self, source: Sequence[Piece], target: Sequence[Piece], device: torch.device) -> None:
        outgoing, incoming = (torch.empty(max((sum(sizes) for sizes in all_sizes), default=0), dtype=torch.uint8,
                                          device=device)
                              for all_sizes in ([one.sent for one in self._rounds],
                                                [one.received for one in self._rounds]))
        for one in self._rounds:
            out, into = outgoing[: sum(one.sent)], incoming[: sum(one.received)]
            for packed, view in _laid_out(out, one.sends, source, one.itemsize):
                packed.copy_(view)
            exchange(into, out, self._axis, one.received, one.sent)
            for packed, view in _laid_out(into, one.receives, target, one.itemsize):
                view.copy_(packed)

    def _send_changes(self, one: Round, source: Sequence[Piece], target: Sequence[Piece], device: torch.device) -> int:
        """A round of what is not as it was sent last: first how much, then what; the bytes received."""
        bits, peers = BITS[one.itemsize], range(self._axis.size)
        now = [source[part.piece].view(part.region).detach().view(bits) for part in one.sends]
        places = [places_of_changes(new, self._sent[part.piece].view(part.region).view(bits))
                  for new, part in zip(now, one.sends, strict=True)]
        told = torch.tensor([len(each) for each in places], dtype=torch.int64).to(device)
        heard = torch.empty(len(one.receives), dtype=torch.int64, device=device)
        exchange(heard, told, self._axis, *([sum(part.peer == peer for part in parts) for peer in peers]
                                            for parts in (one.receives, one.sends)))
        counts = heard.tolist()
        leave = [size_of_changes(len(each), new.numel(), one.itemsize) for each, new in zip(places, now, strict=True)]
        come = [size_of_changes(count, part.region.num_elements, one.itemsize)
                for count, part in zip(counts, one.receives, strict=True)]
        out, into = (torch.empty(sum(sizes), dtype=torch.uint8, device=device) for sizes in (leave, come))
        for new, each, packed in zip(now, places, out.split(leave), strict=True):
            encode(new, each, packed)
        exchange(into, out, self._axis, *([sum(size for size, part in zip(sizes, parts, strict=True)
                                               if part.peer == peer) for peer in peers]
                                          for sizes, parts in ((come, one.receives), (leave, one.sends))))
        for part, count, packed in zip(one.receives, counts, into.split(come), strict=True):
            apply(target[part.piece].view(part.region).detach().view(bits), count, packed)
        return sum(come)

    def _remember(self, source: Sequence[Piece]) -> None:
        """What has been sent, where changes alone are sent from now on."""
        self._is_first = False
        for number in {part.piece for one in self._rounds for part in one.sends} if self._delta else ():
            if number in self._sent:
                self._sent[number].tensor.copy_(source[number].tensor)
            else:
                self._sent[number] = replace(source[number], tensor=source[number].tensor.detach().clone())


def _laid_out(buffer: Tensor, transfers: Sequence[Transfer], pieces: Sequence[Piece],
              itemsize: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Each transfer's place in a buffer, and in its piece; both as integers of the same width."""
    flat, at = buffer.view(BITS[itemsize]), 0
    for transfer in transfers:
        view = pieces[transfer.piece].view(transfer.region).detach()
        yield flat[at : at + view.numel()].view(view.shape), view.view(BITS[itemsize])
        at += view.numel()


Grain = tuple[str, Box]


def _grains(own: Routes, sizes: dict[str, int], shapes: dict[str, tuple[int, ...]], bucket_bytes: int,
            largest: Callable[[list[int]], list[int]]) -> list[tuple[Grain, int]]:
    """Boxes that make up all tensors, in an order, and the most bytes that a rank sends or receives for each.

    `largest` is the agreement of all ranks; all cut the same grains, however little they have to do with them.
    """
    order = sorted(shapes, key=lambda key: (-sizes[key], key))
    both = _by_key(own.sends), _by_key(own.receives)

    def num_bytes(grain: Grain, transfers: dict[str, list[Transfer]]) -> int:
        return sizes[grain[0]] * sum(part.region.num_elements for part in _within(grain, transfers))

    done: list[tuple[Grain, int]] = []
    open_: list[Grain] = [(key, Box.whole(shapes[key])) for key in order]
    while open_:
        known = largest([max(num_bytes(grain, transfers) for transfers in both) for grain in open_])
        cut: list[Grain] = []
        for grain, most in zip(open_, known, strict=True):
            if most <= bucket_bytes or grain[1].num_elements <= 1:
                done.append((grain, most))
            else:
                cut += [(grain[0], part) for part in _cut(grain[1], -(-most // bucket_bytes))]
        open_ = cut
    rank_of = {key: index for index, key in enumerate(order)}
    return sorted(done, key=lambda entry: (rank_of[entry[0][0]], entry[0][1]))


def _by_key(transfers: Sequence[Transfer]) -> dict[str, list[Transfer]]:
    found: dict[str, list[Transfer]] = {}
    for transfer in transfers:
        found.setdefault(transfer.key, []).append(transfer)
    return found


def _within(grain: Grain, transfers: dict[str, list[Transfer]]) -> list[Transfer]:
    """The parts of transfers that lie in a grain."""
    key, box = grain
    return [transfer._replace(region=overlap) for transfer in transfers.get(key, ())
            if (overlap := transfer.region.intersect(box)) is not None]


def _cut(box: Box, parts: int) -> list[Box]:
    """About equal parts along the longest dimension."""
    dim = max(range(len(box.size)), key=lambda d: box.size[d])
    length = box.size[dim]
    edges = sorted({length * i // parts for i in range(parts + 1)})
    return [box.narrow(dim, start, stop - start) for start, stop in pairwise(edges)]


def _batches(grains: Sequence[tuple[Grain, int]], sizes: dict[str, int], bucket_bytes: int) -> Iterator[list[Grain]]:
    """Grains by round: of one width of elements, together no more than a buffer; those that nobody sends left out."""
    for _, of_one_width in groupby((entry for entry in grains if entry[1]), key=lambda entry: sizes[entry[0][0]]):
        batch: list[Grain] = []
        total = 0
        for grain, most in of_one_width:
            if batch and total + most > bucket_bytes:
                yield batch
                batch, total = [], 0
            batch.append(grain)
            total += most
        yield batch


def _round(own: Routes, grains: Sequence[Grain], num_ranks: int, sizes: dict[str, int]) -> Round:
    """This rank's part of a round: what lies in its grains, by peer, in one order at both ends."""
    def within(transfers: Sequence[Transfer]) -> list[Transfer]:
        by_key = _by_key(transfers)
        return sorted((part for grain in grains for part in _within(grain, by_key)),
                      key=lambda part: (part.peer, part.key, part.region))

    def by_peer(transfers: Sequence[Transfer]) -> list[int]:
        totals = [0] * num_ranks
        for transfer in transfers:
            totals[transfer.peer] += transfer.region.num_elements * sizes[transfer.key]
        return totals

    sends, receives = within(own.sends), within(own.receives)
    return Round(sends, receives, by_peer(sends), by_peer(receives), sizes[grains[0][0]])
