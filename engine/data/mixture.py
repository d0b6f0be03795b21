"""Mixing corpora: sample i → (source, position in that source), as arithmetic.

A mixture should hand out its sources in the proportion of their weights *at every moment*, not only on average: drawing at random strays by
√n samples, and a list of choices has to be built, stored and rebuilt.  Two sources need neither.  If the left one weighs a out of b, let it have

    L(n) = round(a·n / b) = ⌊(2·a·n + b) / 2b⌋        of the first n samples,

and the right one the other n - L(n).  Sample n is left's if L(n+1) > L(n); it is left's sample number L(n), or right's number n - L(n).
Neither count is ever more than half a sample from its share, and everything is integer arithmetic with random access.

Many sources are a binary tree of such splits: every node deals the samples that reach it to its two children.  A node's error of
at most 1/2 reaches a leaf below it in the proportion of the leaf in the child, so for a leaf of weight w

    |count - w·n| ≤ ½ · Σ w / w(a)      over a = the leaf and its ancestors, without the root (weights as shares of the root).

The tree is ours to choose, so it is chosen to keep this sum small: `_best_tree` looks at all trees of up to 8 sources.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, inf, lcm
from numbers import Rational

from engine.errors import DataError

MAX_SEARCHED = 8


@dataclass(frozen=True)
class Split:
    """One node: of every `total` samples, `left_weight` go left."""

    left: Split | int
    right: Split | int
    left_weight: int
    total: int

    def num_left(self, num_samples: int) -> int:
        """How many of the first `num_samples` at this node go left: the nearest integer to the share, halves up."""
        return (2 * self.left_weight * num_samples + self.total) // (2 * self.total)


Node = Split | int  # a leaf is the number of its source


@dataclass(frozen=True)
class Phase:
    """A stretch of samples over which the same sources take part."""

    start: int                     # first sample of the phase
    tree: Node
    positions: tuple[int, ...]     # per source: samples it gave before this phase


class Mixture:
    """Deals samples 0, 1, 2, … to sources in the proportion of `weights`.

    `caps[s]` (None: no limit) is the number of samples source s can give.  A source that reached its cap leaves, and from then on its share goes
    to the others in proportion: a new phase, over the remaining sources.  When all have left, the mixture ends at `num_samples`.

    Raises DataError for weights that are not positive numbers.
    """

    def __init__(self, weights: Sequence[Rational | float], caps: Sequence[int | None] | None = None) -> None:
        self.weights = tuple(_fraction(weight) for weight in weights)
        self.caps = tuple(caps) if caps is not None else (None,) * len(self.weights)
        if not self.weights or min(self.weights) <= 0 or any(cap is not None and cap < 1 for cap in self.caps):
            raise DataError(f"A mixture needs sources with positive weights and caps; these have weights "
                            f"{[float(w) for w in self.weights]} and caps {list(self.caps)}.")
        self.num_samples: int | None = None
        self.phases: tuple[Phase, ...] = tuple(self._plan())
        self._starts = [phase.start for phase in self.phases]

    def _plan(self) -> list[Phase]:
        phases: list[Phase] = []
        start, positions, active = 0, [0] * len(self.weights), list(range(len(self.weights)))
        while active:
            tree = best_tree({source: self.weights[source] for source in active})
            phases.append(Phase(start, tree, tuple(positions)))
            limits = {s: cap - positions[s] for s in active if (cap := self.caps[s]) is not None}
            if not limits:
                return phases
            length = _samples_until_exhausted(tree, limits)
            for source, count in _counts(tree, length).items():
                positions[source] += count
            start += length
            active = [s for s in active if self.caps[s] is None or positions[s] < (self.caps[s] or 0)]
        self.num_samples = start
        return phases

    def locate(self, sample: int) -> tuple[int, int]:
        """(source, position in that source) of a sample.  Raises DataError past the end of an exhausted mixture."""
        if sample < 0 or (self.num_samples is not None and sample >= self.num_samples):
            raise DataError(f"Sample {sample} was asked for, but the mixture ends after {self.num_samples} samples: every source "
                            "has reached its max_epochs. Raise max_epochs, add data, or train fewer steps.")
        phase = self.phases[bisect_right(self._starts, sample) - 1] if len(self.phases) > 1 else self.phases[0]
        position = sample - phase.start
        node = phase.tree
        while not isinstance(node, int):
            before, remainder = divmod(2 * node.left_weight * position + node.total, 2 * node.total)
            if remainder + 2 * node.left_weight >= 2 * node.total:  # the count on the left rises with this sample
                node, position = node.left, before
            else:
                node, position = node.right, position - before
        return node, phase.positions[node] + position

    def counts(self, num_samples: int) -> list[int]:
        """Samples per source among the first `num_samples`."""
        phase = self.phases[bisect_right(self._starts, num_samples) - 1]
        counts = list(phase.positions)
        for source, count in _counts(phase.tree, num_samples - phase.start).items():
            counts[source] += count
        return counts

    def max_deviation(self) -> float:
        """Proven bound of |count - share| over all sources and all prefixes of a phase, in samples."""
        return max(_deviation(phase.tree) for phase in self.phases)


def _fraction(weight: Rational | float) -> Fraction:
    """The decimal the user wrote: 0.1 is one tenth, not the nearest binary number."""
    try:
        return Fraction(weight) if isinstance(weight, Rational) else Fraction(str(weight))
    except ValueError:
        raise DataError(f"A weight must be a positive number, not {weight!r}.") from None


def best_tree(weights: dict[int, Fraction]) -> Node:
    """The tree of splits over these sources whose leaves stay closest to their shares.

    With c = 2, twice the deviation allowed, a leaf demands w·Σ 1/w(a) ≤ c, that is: its slack c/w - 1/w, less 1/w(a) for every
    ancestor a below the root, must not be negative.  A subtree's slack is that of its worst leaf, so the best subtree over every set of sources follows
    from those over smaller sets.  Beyond `MAX_SEARCHED` sources, the two lightest are first joined until few enough are left.
    """
    scale = lcm(*(weight.denominator for weight in weights.values()))
    groups: list[tuple[int, float, Node]] = []  # weight, slack, subtree
    for source, weight in weights.items():
        whole = int(weight * scale)
        groups.append((whole, 1 / whole, source))
    while len(groups) > MAX_SEARCHED:
        groups.sort(key=lambda group: group[0])
        first, second = groups.pop(0), groups.pop(0)
        total = first[0] + second[0]
        groups.append((total, min(first[1], second[1]) - 1 / total, _split(first[2], second[2], first[0], total)))
    return _best_split(groups)


def _best_split(groups: list[tuple[int, float, Node]]) -> Node:
    """Dynamic programming over all subsets of the groups, each a bit mask."""
    best: list[tuple[int, float, Node]] = [(0, inf, 0)] * (1 << len(groups))
    everything = len(best) - 1
    for mask in range(1, len(best)):
        lowest = mask & -mask
        rest = mask ^ lowest
        if not rest:
            best[mask] = groups[lowest.bit_length() - 1]
            continue
        choice, slack, part = rest, -inf, rest
        while part:  # every non-empty part of `rest` against what is left with `lowest`
            worst = min(best[part][1], best[mask ^ part][1])
            if worst > slack:
                choice, slack = part, worst
            part = (part - 1) & rest
        left, right = best[mask ^ choice], best[choice]
        total = left[0] + right[0]
        best[mask] = (total, slack - (0 if mask == everything else 1 / total), _split(left[2], right[2], left[0], total))
    return best[everything][2]


def _split(left: Node, right: Node, left_weight: int, total: int) -> Split:
    divisor = gcd(left_weight, total)
    return Split(left, right, left_weight // divisor, total // divisor)


def _counts(node: Node, num_samples: int) -> dict[int, int]:
    if isinstance(node, int):
        return {node: num_samples}
    num_left = node.num_left(num_samples)
    return _counts(node.left, num_left) | _counts(node.right, num_samples - num_left)


def _samples_until_exhausted(tree: Node, limits: dict[int, int]) -> int:
    """The shortest prefix in which some source gives as many samples as it has left."""
    low, high = 0, 1
    while not _reaches(tree, limits, high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _reaches(tree, limits, middle) else (middle, high)
    return high


def _reaches(tree: Node, limits: dict[int, int], num_samples: int) -> bool:
    counts = _counts(tree, num_samples)
    return any(counts[source] >= limit for source, limit in limits.items())


def _deviation(node: Node) -> float:
    """½ · max over leaves of Σ w / w(a), see the module's docstring; shares are carried down from the root."""

    def worst(below: Node, share: float, inverse_shares: float) -> float:
        if isinstance(below, int):
            return share * inverse_shares / 2
        left = share * below.left_weight / below.total
        right = share - left
        return max(worst(below.left, left, inverse_shares + 1 / left), worst(below.right, right, inverse_shares + 1 / right))

    return worst(node, 1.0, 0.0)
