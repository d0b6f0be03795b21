"""`octant bench network`: what messages and collectives take between the processes of a job, and which pair is slow.

    inside     all ranks of a node
    across     one rank of every node, each of them at the same time
    all        all ranks

A collective of every size is timed on its slowest rank.  Then pairs exchange a short and a long message, every rank
with one other at a time in the order of a round-robin tournament, so that each pair is seen alone; a pair that takes
`SLOW` times as long as the median of its kind is named, and a rank that is slow with most others is named itself.

The α-β model of `engine.plan.cost` is fitted to them: seconds = α · steps + β · bytes on the wire, where a ring of g
has g − 1 steps and (g − 1)/g of the bytes, an all-reduce twice of both, and between nodes a tree has 2 · log₂ steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median, median_low
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from engine.distributed.agree import gather_json
from engine.distributed.collectives import all_gather_into, all_reduce, reduce_scatter_into
from engine.distributed.mesh import Axis, Job
from engine.distributed.topology import Topology
from engine.metrics.phases import Phases, seconds

OPERATIONS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}          # and how often the bytes go round
SLOW = 2.0
MOST_ROUNDS = 63                           # of pairs across nodes: each rank opens a connection for each
WARMUP = 2
INSIDE, ACROSS, ALL = "inside", "across", "all"


@dataclass(frozen=True)
class Timed:
    """A collective.

    Attributes:
        num_bytes: of the whole tensor: what an all-gather puts together, a reduce-scatter takes apart.
        ranks: of its group; `nodes` that they lie on.
    """

    operation: str
    scope: str
    ranks: int
    nodes: int
    num_bytes: int
    seconds: float

    @property
    def wire_bytes(self) -> float:
        """What crosses the slowest link of a ring."""
        return OPERATIONS[self.operation] * (self.ranks - 1) / self.ranks * self.num_bytes

    @property
    def steps(self) -> int:
        """Latencies one behind the other, as the planner counts them."""
        inside, between = self.ranks // self.nodes - 1, (self.nodes - 1).bit_length() * 2
        return OPERATIONS[self.operation] * (inside + between)


@dataclass(frozen=True)
class Pair:
    """Two ranks: seconds of a short and of a long message from one to the other."""

    ranks: tuple[int, int]
    scope: str
    short: float
    long: float


@dataclass(frozen=True)
class Fit:
    """Latency and bandwidth, and how far off they are on average."""

    latency_seconds: float
    bytes_per_second: float
    error: float


@dataclass(frozen=True)
class Network:
    """What came of it, the same on every rank.

    Attributes:
        hosts: by rank.
        short, long: bytes of the messages of pairs.
        slow: for people.
    """

    world: int
    nodes: int
    hosts: list[str]
    rows: list[Timed]
    pairs: list[Pair]
    short: int
    long: int
    fit: dict[str, Fit]
    slow: list[str]

    def record(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"benchmark": "network", "world": self.world, "nodes": self.nodes, "hosts": self.hosts,
                "rows": [asdict(row) | {"bus_bytes_per_second": row.wire_bytes / row.seconds} for row in self.rows],
                "pairs": [asdict(pair) for pair in self.pairs], "message_bytes": [self.short, self.long],
                "fit": {name: asdict(fit) for name, fit in self.fit.items()}, "slow": self.slow}


def measure(job: Job, per_node: int, host: str, sizes: Sequence[int], repeats: int) -> Network:
    """Every rank of the job calls this.

    Args:
        per_node: ranks on a node, one behind the other.
        host: this rank's, by name.
        sizes: bytes of the collectives' tensors; the shortest and the longest are those of messages.
    """
    nodes = job.size // per_node
    grid, whole = job.mesh(Topology(data=nodes, tensor=per_node)), job.mesh(Topology(tensor=job.size))
    scopes = {INSIDE: (grid.tensor, 1), ACROSS: (grid.data, nodes), ALL: (whole.tensor, nodes)}
    if nodes == 1 or per_node == 1:
        del scopes[ALL]                                        # is one of the others
    turns, group = _Turns(job.device, repeats), job.world.group
    timings = [Timed(operation, scope, axis.size, over, size, _collective(operation, axis, size, turns))
               for scope, (axis, over) in scopes.items() if axis.size > 1 for operation in OPERATIONS
               for size in (_divisible(size, axis.size) for size in sizes)]
    told = gather_json([timing.seconds for timing in timings], group)
    rows = [Timed(it.operation, it.scope, it.ranks, it.nodes, it.num_bytes, max(column))
            for it, column in zip(timings, zip(*told, strict=True), strict=True)]
    short, long = min(sizes), max(sizes)
    own = [*_pairs(grid.tensor, INSIDE, (short, long), turns),
           *_pairs(grid.data, ACROSS, (short, long), turns)]
    pairs = sorted((Pair(tuple(ranks), *rest) for each in gather_json([list(asdict(pair).values()) for pair in own],
                                                                     group) for ranks, *rest in each),
                   key=lambda pair: pair.ranks)
    hosts = gather_json(host, group)
    return Network(job.size, nodes, hosts, rows, pairs, short, long, fits(rows, pairs, short, long),
                   slow_ones(pairs, hosts))


class _Turns:
    """Does something some times and says what it takes."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self._repeats, self._clock = device, repeats, Phases(device)

    def each(self, once: Callable[[], None], ready: Callable[[], object] = lambda: None) -> list[float]:
        """Seconds on this rank; `ready` is done before each time and does not count."""
        taken = []
        for turn in range(-WARMUP, self._repeats):
            ready()
            begin = self._clock.mark()
            once()
            if turn >= 0:
                taken.append((begin, self._clock.mark()))
        return [seconds(*span) for span in taken]


def _divisible(num_bytes: int, ranks: int) -> int:
    """The next size of whole fp32 elements for every rank."""
    return -(-num_bytes // (4 * ranks)) * 4 * ranks


def _collective(operation: str, axis: Axis, num_bytes: int, turns: _Turns) -> float:
    """Median seconds on this rank, from a moment at which all are there."""
    whole = torch.zeros(num_bytes // 4, device=turns.device)
    part, ready = whole.new_zeros(num_bytes // 4 // axis.size), whole.new_zeros(1)

    def once() -> None:
        if operation == "all_reduce":
            all_reduce(whole, axis)
        elif operation == "all_gather":
            all_gather_into(whole, part, axis).wait()
        else:
            reduce_scatter_into(part, whole, axis).wait()

    return median(turns.each(once, lambda: all_reduce(ready, axis)))


def rounds(number: int) -> Iterator[list[tuple[int, int]]]:
    """Every pair of `number` players once, each in one pair a round (the circle method)."""
    players = [*range(number), *([-1] if number % 2 else [])]
    for _ in range(len(players) - 1):
        half = len(players) // 2
        yield [(min(a, b), max(a, b)) for a, b in zip(players[:half], reversed(players[half:]), strict=True)
               if min(a, b) >= 0]
        players = [players[0], players[-1], *players[1:-1]]


def _pairs(axis: Axis, scope: str, sizes: tuple[int, int], turns: _Turns) -> list[Pair]:
    """Those of this rank and a later one of the axis."""
    found = []
    for number, pairs in enumerate(rounds(axis.size)):
        if number == MOST_ROUNDS:
            break
        for first, second in pairs:
            if axis.index in (first, second):
                ranks = axis.ranks[first], axis.ranks[second]
                short, long = (_message(axis, ranks, axis.index == first, size, turns) for size in sizes)
                if axis.index == first:
                    found.append(Pair(ranks, scope, short, long))
    return found


def _message(axis: Axis, ranks: tuple[int, int], serves: bool, num_bytes: int, turns: _Turns) -> float:
    """Seconds of a message one way: half of there and back, at best, for a pair that is slow is never fast."""
    ball, (first, second) = torch.zeros(max(num_bytes // 4, 1), device=turns.device), ranks
    other = second if serves else first

    def once() -> None:
        for sender in ranks:
            if serves == (sender == first):
                dist.send(ball, other, group=axis.group)
            else:
                dist.recv(ball, other, group=axis.group)

    return min(turns.each(once)) / 2


def slow_ones(pairs: Sequence[Pair], hosts: Sequence[str]) -> list[str]:
    """Ranks that are slow with most others, and other pairs that are slow, in words; the slowest first."""
    factors: dict[tuple[int, int], tuple[float, str]] = {}
    for scope in (INSIDE, ACROSS):
        kind = [pair for pair in pairs if pair.scope == scope]
        for name in ("short", "long"):
            if len(kind) > 1:
                usual = median_low(getattr(pair, name) for pair in kind)     # one slow rank of four is in half of them
                for pair in kind:
                    factor = getattr(pair, name) / usual
                    if factor >= SLOW and factor > factors.get(pair.ranks, (0.0, ""))[0]:
                        factors[pair.ranks] = factor, f"the median {name} message {scope} {_where(scope)}"
    of_rank: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for pair in pairs:
        for rank in pair.ranks:
            of_rank[rank].append(pair.ranks)
    bad = {rank for rank, its in of_rank.items()
           if len(its) > 1 and sum(each in factors for each in its) > len(its) / 2}
    said = []
    for rank in sorted(bad):
        worst = max(factors[each][0] for each in of_rank[rank] if each in factors)
        said.append((worst, f"rank {rank} ({hosts[rank]}) is slow with most others, at worst {worst:.1f} × the median"))
    for (a, b), (factor, what) in factors.items():
        if not {a, b} & bad:
            said.append((factor, f"ranks {a} ({hosts[a]}) and {b} ({hosts[b]}): {factor:.1f} × {what}"))
    return [line for _, line in sorted(said, reverse=True)]


def _where(scope: str) -> str:
    return "a node" if scope == INSIDE else "nodes"


def fits(rows: Sequence[Timed], pairs: Sequence[Pair], short: int, long: int) -> dict[str, Fit]:
    """α and β of collectives inside a node, of those across nodes, and of messages, as far as there are any."""
    found = {}
    for scope in (INSIDE, ACROSS):
        points = [(row.steps, row.wire_bytes, row.seconds) for row in rows if row.scope == scope]
        messages = [(1.0, float(size), taken) for pair in pairs if pair.scope == scope
                    for size, taken in ((short, pair.short), (long, pair.long))]
        for name, each in ((scope, points), (f"message {scope}", messages)):
            if each:
                found[name] = fit(each)
    return found


def fit(points: Sequence[tuple[float, float, float]]) -> Fit:
    """Of (steps, bytes, seconds), by least squares of the relative error; neither α nor β is below 0."""
    steps, sizes, taken = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    terms = np.stack((steps / taken, sizes / taken), axis=1)
    solution = np.linalg.lstsq(terms, np.ones(len(taken)), rcond=None)[0]
    for index in (0, 1):
        if solution[index] <= 0:                               # then the other alone explains them better
            other = terms[:, 1 - index]
            solution[index], solution[1 - index] = 1e-15, float(other.sum() / (other @ other))
    off = mean(abs(float(each) - 1) for each in terms @ solution)
    return Fit(float(solution[0]), 1 / float(solution[1]), off)
