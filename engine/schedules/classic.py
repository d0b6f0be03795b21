"""GPipe, 1F1B and interleaved 1F1B: one rule with different warm-ups.

All three run some forwards first (the warm-up), then alternate one forward and one backward, then run the backwards
that are left (the cool-down).  Only the length of the warm-up differs, and it decides the memory: warm-up + 1
activations are held at once.

* GPipe (Huang et al. 2019): the warm-up is everything, so all M activations are held.
* 1F1B (Narayanan et al. 2019, PipeDream-Flush): a rank runs forwards until the first backward can reach it, which is
  P - rank - 1 of them.  The same bubble as GPipe, (P-1)(F+B+W), with at most P - rank activations.
* Interleaved 1F1B (Narayanan et al. 2021, Megatron-LM): every rank holds V chunks, chunk c on rank c mod P, and a
  microbatch passes over the ranks V times.  A step through the pipeline is V times shorter, and so is the bubble,
  (P-1)(F+B+W)/V; the price is V times the messages and a longer warm-up.

The microbatches of the interleaved schedule go in groups of P: a group runs through chunk 0, then through chunk 1, …,
since its first microbatch comes back to rank 0 just when the last has left it.  Megatron-LM asks for M to be a
multiple of P.  It need not be: let the last group take in the remainder (so it has P … 2P-1) and count the warm-up
with that group, and the bubble is (P-1)(F+B+W)/V for every M ≥ P, at the cost of the larger group's activations.
With M < P all is one group; it works, and waits.

Each function returns the program of one rank, and backwards run in the order of the microbatches, so gradients are
summed in the same order whatever the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.schedules.action import Action, Kind


def gpipe(rank: int, num_stages: int, num_microbatches: int, num_chunks: int) -> tuple[Action, ...]:
    """All forwards, then all backwards."""
    forwards, backwards = _interleave(rank, num_stages, [range(num_microbatches)], num_chunks)
    return _alternate(forwards, backwards, warmup=len(forwards))


def one_f_one_b(rank: int, num_stages: int, num_microbatches: int, num_chunks: int) -> tuple[Action, ...]:
    """Alternate as soon as the first backward can arrive."""
    forwards, backwards = _interleave(rank, num_stages, [range(num_microbatches)], num_chunks)
    return _alternate(forwards, backwards, warmup=num_stages - rank - 1)


def interleaved(rank: int, num_stages: int, num_microbatches: int, num_chunks: int) -> tuple[Action, ...]:
    """1F1B over V chunks per rank, the microbatches in groups of P (the last one up to 2P-1)."""
    starts = range(0, max(num_microbatches - num_stages, 0) + 1, num_stages)
    groups = [range(start, stop) for start, stop in zip(starts, [*starts[1:], num_microbatches], strict=True)]
    forwards, backwards = _interleave(rank, num_stages, groups, num_chunks)
    return _alternate(forwards, backwards, warmup=2 * (num_stages - rank - 1) + (num_chunks - 1) * len(groups[-1]))


def _interleave(rank: int, num_stages: int, groups: Sequence[range], num_chunks: int,
                ) -> tuple[list[Action], list[Action]]:
    """All forwards and all backwards of a rank: group by group, within it chunk by chunk."""
    chunks = range(rank, num_stages * num_chunks, num_stages)
    forwards = [Action(Kind.F, m, chunk) for group in groups for chunk in chunks for m in group]
    backwards = [Action(Kind.BW, m, chunk) for group in groups for chunk in reversed(chunks) for m in group]
    return forwards, backwards


def _alternate(forwards: Sequence[Action], backwards: Sequence[Action], warmup: int) -> tuple[Action, ...]:
    """`warmup` forwards, then forward and backward in turns, then the backwards that are left."""
    warmup = min(warmup, len(forwards))
    steady = [action for pair in zip(forwards[warmup:], backwards, strict=False) for action in pair]
    return (*forwards[:warmup], *steady, *backwards[len(forwards) - warmup:])
