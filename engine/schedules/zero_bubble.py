"""Zero-bubble schedules: split the backward, and do the part nobody waits for in the gaps.

In 1F1B a rank sends its input gradient upstream only after computing its weight gradients too, and every rank above
waits for both.  Splitting the backward into B (input gradient, on the critical path) and W (weight gradient, needed
only by the optimizer) shortens the critical path to F + B per rank and leaves W as filling (Qi et al. 2023, *Zero
Bubble Pipeline Parallelism*).

**ZB-H1 and ZB-H2** are one schedule with a memory factor k = 1, 2.  Rank r starts with k(P-1-r) forwards, then
repeats F, B, W with W running k·r microbatches behind B: the later a rank, the less it has to warm up with and the
more W it has left for the end.  The bubble shrinks by (k+1)·W per rank, and every rank holds at most k(P-1) + 1
activations:

    1F1B   bubble (P-1)(F+B+W)    rank r holds P - r
    ZB-H1  bubble (P-1)(F+B-W)    holds P              the memory of 1F1B's first rank
    ZB-H2  bubble (P-1)(F+B-2W)   holds 2P-1           no bubble when F = B = W

exactly so where W ≤ F, W ≤ B, messages take no time, and M ≥ k(P-1) + 1.

**ZB-V** (Qi et al. 2024, *Pipeline Parallelism with Controllable Memory*) has no bubble when F = B = W, within the
memory of 1F1B's first rank.  Each rank holds two chunks in the shape of a V: chunks 0 … P-1 go down the ranks and P …
2P-1 come back up, so the last layers live on the first rank.  Let F B W stand for the chunk on the way down and f b w
for the one on the way up.  Rank r, with n = P - r ranks from it to the bottom of the V, runs

    F × (2n-1)   fF × r   fbw × n          fill up to 2P activations (half a stage each), and start emptying
    FBWfbw × (M-P-n+1)   BWfbw × (n-1)     one in, one out
    Bb × r   BW × n   w × r   W × r        what is left: B first, since others wait for it

without a gap for M ≥ 2P-1.  With fewer microbatches the order is that for 2P-1, the missing ones left out.
"""

from __future__ import annotations

from itertools import count

from engine.schedules.action import Action, Kind


def zb_h1(rank: int, num_stages: int, num_microbatches: int, num_chunks: int) -> tuple[Action, ...]:
    """Zero bubble within the memory of 1F1B: a third of its bubble when F = B = W."""
    return _deferred(rank, num_microbatches, warmup=num_stages - 1 - rank, delay=rank)


def zb_h2(rank: int, num_stages: int, num_microbatches: int, num_chunks: int) -> tuple[Action, ...]:
    """Zero bubble with about twice the memory of 1F1B: none left when F = B = W."""
    return _deferred(rank, num_microbatches, warmup=2 * (num_stages - 1 - rank), delay=2 * rank)


def zb_v(rank: int, num_stages: int, num_microbatches: int, num_chunks: int) -> tuple[Action, ...]:
    """Two chunks per rank in a V: zero bubble within the memory of 1F1B when F = B = W."""
    below = num_stages - rank                           # ranks from here to the bottom of the V, this one included
    total = max(num_microbatches, 2 * num_stages - 1)
    pattern = ("F" * (2 * below - 1) + "fF" * rank + "fbw" * below
               + "FBWfbw" * (total - num_stages - below + 1) + "BWfbw" * (below - 1)
               + "Bb" * rank + "BW" * below + "w" * rank + "W" * rank)
    chunk_of = {"F": rank, "B": rank, "W": rank}
    chunk_of |= {letter.lower(): 2 * num_stages - 1 - rank for letter in "FBW"}
    next_microbatch = {letter: count() for letter in chunk_of}
    program = (Action(Kind(letter.upper()), next(next_microbatch[letter]), chunk_of[letter]) for letter in pattern)
    return tuple(action for action in program if action.microbatch < num_microbatches)


def _deferred(rank: int, num_microbatches: int, warmup: int, delay: int) -> tuple[Action, ...]:
    """`warmup` forwards, then F, B, W in turns with W running `delay` microbatches behind B."""
    program = [Action(Kind.F, m, rank) for m in range(min(warmup, num_microbatches))]
    for m in range(num_microbatches):
        program += [Action(Kind.F, m + warmup, rank)] if m + warmup < num_microbatches else []
        program += [Action(Kind.B, m, rank)]
        program += [Action(Kind.W, m - delay, rank)] if m >= delay else []
    return (*program, *(Action(Kind.W, m, rank) for m in range(max(num_microbatches - delay, 0), num_microbatches)))
