"""Actions: the vocabulary a pipeline schedule is written in.

The layers of the model are dealt into *chunks*, numbered 0, 1, 2, … in model order over the whole pipeline.  A rank
(a physical stage) holds one chunk, or several in the schedules that interleave.  For every chunk and microbatch:

    F    forward: the chunk's output from its input
    B    backward towards the input: the gradient that the chunk before is waiting for
    W    backward towards the weights: nobody is waiting for it, so it may be done later and fill a gap
    BW   B and W as one, which is what autograd does by itself

F needs the output of the chunk before; B needs its own F and the input gradient of the chunk after; W needs its own B.
Where the neighbouring chunk lives on another rank, the tensor has to travel:

    SEND_F  at chunk c   sends the output of c to the rank of c + 1       →  RECV_F at chunk c + 1
    SEND_B  at chunk c   sends the input gradient of c to the rank of c - 1  →  RECV_B at chunk c - 1

REDUCE_GRAD says that a chunk's gradients are complete and may be reduced over the data-parallel ranks.

An action prints as chunk, kind, microbatch — `2F0`, `2SEND_F0`, `2REDUCE_GRAD` — in every grid, error, log and
profile.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What an action does."""

    F = "F"
    B = "B"
    W = "W"
    BW = "BW"
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"
    REDUCE_GRAD = "REDUCE_GRAD"

    @property
    def is_compute(self) -> bool:
        """F, B, W or BW: what occupies the rank, and what a schedule orders."""
        return self in (Kind.F, Kind.B, Kind.W, Kind.BW)

    @property
    def is_communication(self) -> bool:
        """A SEND or RECV between pipeline ranks.  REDUCE_GRAD is not one: it stays among data-parallel ranks."""
        return self in (Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B)

    @property
    def makes_weight_gradient(self) -> bool:
        """W or BW: after it, the microbatch has added its part to the chunk's gradients and its activation is freed."""
        return self in (Kind.W, Kind.BW)


@dataclass(frozen=True, slots=True)
class Action:
    """One thing a rank does, for one microbatch of one chunk.

    Attributes:
        kind: what is done.
        microbatch: 0 … M-1; 0 for REDUCE_GRAD, which belongs to all of them.
        chunk: global chunk index in model order, 0 … P·V-1.
    """

    kind: Kind
    microbatch: int
    chunk: int

    def __str__(self) -> str:
        microbatch = "" if self.kind is Kind.REDUCE_GRAD else self.microbatch
        return f"{self.chunk}{self.kind}{microbatch}"

    @property
    def parts(self) -> tuple[Action, ...]:
        """What is done once this is done: B and W for BW, otherwise the action itself."""
        if self.kind is Kind.BW:
            return Action(Kind.B, self.microbatch, self.chunk), Action(Kind.W, self.microbatch, self.chunk)
        return (self,)

    @property
    def partner(self) -> Action:
        """The RECV at the other end of a SEND, or the SEND at the other end of a RECV."""
        kind, step = _PARTNER[self.kind]
        return Action(kind, self.microbatch, self.chunk + step)


_PARTNER = {                                       # kind at the other end, and how many chunks away that end is
    Kind.SEND_F: (Kind.RECV_F, +1),
    Kind.RECV_F: (Kind.SEND_F, -1),
    Kind.SEND_B: (Kind.RECV_B, -1),
    Kind.RECV_B: (Kind.SEND_B, +1),
}
