"""Telling each other who holds what, in few messages and some hundred bytes per rank.

Ranks at one place of the model (tensor and pipeline position) list the same blocks, whatever their shard.  So first all
exchange a digest of their list; then one rank of each kind tells the list, and every rank its ranges of those blocks,
which repeat from layer to layer and compress well.  The messages are `agree.gather_bytes`'s: twice a logarithm.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence

import numpy as np

from engine.distributed.agree import Group, gather_bytes, rank_in
from engine.distributed.boxes import Box
from engine.distributed.ledger import Block, Catalogue, Integers, Ledger
from engine.distributed.pieces import Piece


def catalogue_of(pieces: Sequence[Piece]) -> list[Block]:
    """The blocks of some pieces."""
    return [Block(p.key, str(p.tensor.dtype).removeprefix("torch."), tuple(p.global_shape), p.box) for p in pieces]


def ranges_of(pieces: Sequence[Piece]) -> Integers:
    """Their ranges, [pieces, 2]."""
    return np.array([(piece.start, piece.stop) for piece in pieces], np.int64).reshape(-1, 2)


def gather_ledger(pieces: Sequence[Piece], group: Group) -> Ledger:
    """Who holds what in a layout.  Every rank of `group` must call this with its pieces.

    Raises:
        ValueError: ranks disagree about a tensor's shape or type.
    """
    catalogue, ranges = catalogue_of(pieces), ranges_of(pieces)
    if group is None:
        return Ledger.of([catalogue], [(0, ranges)])
    text = encode(catalogue)
    digests = gather_bytes(hashlib.sha256(text).digest()[:16], group)
    tells = rank_in(group) in _first_of_each(digests).values()
    return read_announcements(digests, gather_bytes(message(ranges, text if tells else None), group))


def message(ranges: Integers, text: bytes | None) -> bytes:
    """What a rank tells: its ranges, and the text of its catalogue if it is the one that tells it."""
    packed = zlib.compress(ranges.tobytes(), 9)
    return len(packed).to_bytes(4, "little") + packed + (b"" if text is None else zlib.compress(text))


def read_announcements(digests: Sequence[bytes], told: Sequence[bytes]) -> Ledger:
    """The ledger, from what every rank has told."""
    told_by = _first_of_each(digests)
    parts = [(data[4 : (end := 4 + int.from_bytes(data[:4], "little"))], data[end:]) for data in told]
    catalogues = [_decode(parts[rank][1]) for rank in told_by.values()]
    kinds = {digest: kind for kind, digest in enumerate(told_by)}
    return Ledger.of(catalogues, [(kinds[digest], np.frombuffer(zlib.decompress(ranges), np.int64).reshape(-1, 2))
                                  for digest, (ranges, _) in zip(digests, parts, strict=True)])


def _first_of_each(digests: Sequence[bytes]) -> dict[bytes, int]:
    """The first rank that has each."""
    first: dict[bytes, int] = {}
    for rank, digest in enumerate(digests):
        first.setdefault(digest, rank)
    return first


def encode(catalogue: Catalogue) -> bytes:
    """The text of a catalogue."""
    return json.dumps([[b.key, b.dtype, b.shape, b.box.offset, b.box.size] for b in catalogue]).encode()


def _decode(data: bytes) -> list[Block]:
    return [Block(key, dtype, tuple(shape), Box(tuple(offset), tuple(size)))
            for key, dtype, shape, offset, size in json.loads(zlib.decompress(data))]
