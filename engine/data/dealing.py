"""Dealing samples to sources by weight, so that no source is ever more than one sample away from its share.

Drawing a source at random for every sample strays by √n samples; a list of choices must be built, stored and
rebuilt.  Both dealers here answer "which source gets sample n, and the how-manieth of its samples is that?"
directly.

**A table** for weights with a short common period P (0.67, 0.15, … have P = 100).  Source s with share w asks
that after every prefix n it got ⌊wn⌋ or ⌈wn⌉ samples, hence its sample j belongs in one of the slots ⌊j/w⌋ …
⌈(j+1)/w⌉ - 1.  Slots a … b - 1 are claimed by at most Σ max(0, ⌊wb⌋ - ⌈wa⌉) ≤ Σ w·(b - a) = b - a samples that
fit nowhere else, so by Hall's theorem all samples can be placed, and taking the earliest deadline first finds
such a placement (unit jobs on one machine; Baruah, Cohen, Plaxton and Varvel 1996 call it proportionate
fairness).  One period is placed when the mixture is opened; sample n looks up n mod P.

**A tree** for any other weights, in exact integer arithmetic.  With two sources, a out of b for the left one,
let it have

    L(n) = ⌊(2·a·n + b) / 2b⌋,      that is a·n/b rounded,

of the first n samples and the right one the rest: neither is ever more than half a sample off.  Sample n is the
left one's if L(n+1) > L(n).  A tree of such splits deals to many sources.  An error of at most ½ at a node
reaches a leaf in the leaf's proportion, so with shares w

    |count - w·n| ≤ ½ · Σ w / w(a)      over a = the leaf and its ancestors without the root.

The tree is ours to choose, and is chosen to keep this small.  With two pairs, four sources are within ½·(1 + 1);
five always fit a tree within 1 as well (searched, not proven), and more sources fit one or, where their weights lie
orders of magnitude apart, come close.  What holds for given weights is known when the tree is: `max_deviation`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import gcd, inf
from typing import Protocol

import numpy as np

MAX_PERIOD = 1 << 15  # weights of four decimals; placing one such period takes 30 ms
MAX_SEARCHED = 10  # leaves for which every tree is considered
SEARCH_STEPS = 10


class Dealer(Protocol):
    """Deals samples 0, 1, 2, … to sources 0, 1, … of given weights.

    `max_deviation` is a proven bound of |count - share| over all sources and all prefixes, in samples.
    """

    max_deviation: float

    def locate(self, sample: int) -> tuple[int, int]:
        """(source, number of earlier samples of that source)."""

    def counts(self, num_samples: int) -> list[int]:
        """Samples per source among the first `num_samples`."""

    def prefix_with(self, source: int, count: int) -> int:
        """The shortest prefix that holds `count` ≥ 1 samples of `source`."""


def make_dealer(weights: Sequence[int]) -> Dealer:
    """The dealer for positive integer weights: a table where their period is short, else a tree."""
    divisor = gcd(*weights)
    reduced = [weight // divisor for weight in weights]
    return TableDealer(reduced) if sum(reduced) <= MAX_PERIOD else TreeDealer(reduced)


class TableDealer:
    """One period of the earliest-deadline placement, repeated; weights are samples per period."""

    def __init__(self, weights: Sequence[int]) -> None:
        self.weights = tuple(weights)
        self.period = sum(weights)
        self._source = array("q", _place_by_deadline(self.weights))
        slots = np.array(self._source)
        self._slots = [np.flatnonzero(slots == source) for source in range(len(weights))]
        ranks = np.empty(self.period, np.int64)
        for source_slots in self._slots:
            ranks[source_slots] = np.arange(len(source_slots))
        self._rank = array("q", ranks.tobytes())
        self.max_deviation = 1 - 1 / self.period if len(weights) > 1 else 0.0

    def locate(self, sample: int) -> tuple[int, int]:
        turn, slot = divmod(sample, self.period)
        source = self._source[slot]
        return source, turn * self.weights[source] + self._rank[slot]

    def counts(self, num_samples: int) -> list[int]:
        turns, slot = divmod(num_samples, self.period)
        return [
            turns * weight + int(np.searchsorted(slots, slot))
            for weight, slots in zip(self.weights, self._slots, strict=True)
        ]

    def prefix_with(self, source: int, count: int) -> int:
        turns, rank = divmod(count - 1, self.weights[source])
        return turns * self.period + int(self._slots[source][rank]) + 1


def _place_by_deadline(weights: tuple[int, ...]) -> list[int]:
    """The source of every slot of one period: among the samples released, the one with the earliest deadline."""
    period = sum(weights)
    released_at: list[list[tuple[int, int]]] = [[] for _ in range(period)]  # per slot: (deadline, source)
    placed = [0] * len(weights)
    for source, weight in enumerate(weights):
        released_at[0].append((-(-period // weight), source))
    waiting: list[tuple[int, int]] = []
    sources = []
    for slot in range(period):
        for sample in released_at[slot]:
            heappush(waiting, sample)
        _, source = heappop(waiting)
        sources.append(source)
        placed[source] += 1
        if placed[source] < weights[source]:
            release = max(slot + 1, placed[source] * period // weights[source])
            released_at[release].append((-(-(placed[source] + 1) * period // weights[source]), source))
    return sources


@dataclass(frozen=True)
class Split:
    """A node of the tree: of every `total` samples that reach it, `left_weight` go left."""

    left: Split | int
    right: Split | int
    left_weight: int
    total: int

    def num_left(self, num_samples: int) -> int:
        """How many of the first `num_samples` go left: the integer nearest to their share, halves up."""
        return (2 * self.left_weight * num_samples + self.total) // (2 * self.total)


Node = Split | int  # a leaf is the number of its source


class TreeDealer:
    """Rounded two-way splits, all the way down."""

    def __init__(self, weights: Sequence[int]) -> None:
        self.weights = tuple(weights)
        self.tree = best_tree(self.weights)
        self.max_deviation = _deviation(self.tree)

    def locate(self, sample: int) -> tuple[int, int]:
        node, position = self.tree, sample
        while not isinstance(node, int):
            before, remainder = divmod(2 * node.left_weight * position + node.total, 2 * node.total)
            if remainder + 2 * node.left_weight >= 2 * node.total:  # the count on the left rises with this sample
                node, position = node.left, before
            else:
                node, position = node.right, position - before
        return node, position

    def counts(self, num_samples: int) -> list[int]:
        found: dict[int, int] = {}

        def walk(node: Node, reaching: int) -> None:
            if isinstance(node, int):
                found[node] = reaching
            else:
                num_left = node.num_left(reaching)
                walk(node.left, num_left)
                walk(node.right, reaching - num_left)

        walk(self.tree, num_samples)
        return [found[source] for source in range(len(self.weights))]

    def prefix_with(self, source: int, count: int) -> int:
        low, high = 0, 1
        while self.counts(high)[source] < count:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.counts(middle)[source] >= count else (middle, high)
        return high


def _deviation(tree: Node) -> float:
    """½ · max over leaves of Σ w / w(a); shares are carried down from the root."""

    def worst(node: Node, share: float, inverse_shares: float) -> float:
        if isinstance(node, int):
            return share * inverse_shares / 2
        left = share * (node.left_weight / node.total)
        right = share * ((node.total - node.left_weight) / node.total)
        return max(
            worst(node.left, left, inverse_shares + 1 / left), worst(node.right, right, inverse_shares + 1 / right)
        )

    return worst(tree, 1.0, 0.0)


def best_tree(weights: Sequence[int]) -> Node:
    """A tree of splits with a proven deviation of at most 1, else the smallest there is.

    Twice the deviation is at most c if every leaf has a slack c/w - Σ 1/w(a) ≥ 0.  A subtree's slack is its
    worst leaf's, so for given c the best subtree over every set of leaves follows from those over smaller
    sets.  Beyond `MAX_SEARCHED` sources the lightest are joined first, and the result is close to the best.
    """
    low = high = 2.0
    slack, tree = _tree_for(weights, high)
    while slack < 0:
        low, high = high, 2 * high
        slack, tree = _tree_for(weights, high)
    for _ in range(SEARCH_STEPS if high > low else 0):
        middle = (low + high) / 2
        slack, candidate = _tree_for(weights, middle)
        if slack >= 0:
            high, tree = middle, candidate
        else:
            low = middle
    return tree


Group = tuple[int, float, Node]  # weight, slack, subtree


def _tree_for(weights: Sequence[int], limit: float) -> tuple[float, Node]:
    """(slack, tree) with the largest slack where twice the deviation may be `limit`."""
    groups: list[Group] = [(weight, limit / weight - 1 / weight, source) for source, weight in enumerate(weights)]
    while len(groups) > MAX_SEARCHED:  # join the two lightest, as Huffman does
        groups.sort(key=lambda group: group[0])
        groups.append(_join(groups.pop(0), groups.pop(0)))
    best: list[Group] = [(0, inf, 0)] * (1 << len(groups))  # per set of groups, a bit mask
    everything = len(best) - 1
    for mask in range(1, len(best)):
        lowest = mask & -mask
        rest = mask ^ lowest
        best[mask] = _best_parts(best, mask, rest) if rest else groups[lowest.bit_length() - 1]
    weight, slack, tree = best[everything]
    return (slack + 1 / weight if len(groups) > 1 else slack), tree  # the root itself costs nothing


def _best_parts(best: list[Group], mask: int, rest: int) -> Group:
    """The best way to cut the set `mask` in two; `rest` is the set without its lowest member."""
    choice, slack, part = rest, -inf, rest
    while part:
        worst = min(best[part][1], best[mask ^ part][1])
        if worst > slack:
            choice, slack = part, worst
        part = (part - 1) & rest
    return _join(best[mask ^ choice], best[choice])


def _join(left: Group, right: Group) -> Group:
    total = left[0] + right[0]
    divisor = gcd(left[0], total)
    tree = Split(left[2], right[2], left[0] // divisor, total // divisor)
    return total, min(left[1], right[1]) - 1 / total, tree
