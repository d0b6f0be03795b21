"""Which nodes of a job are fit to train on, found out before it does: asked by the batch scripts (`launch/common.sh`).

    python -m engine.launching.preflight tell CONFIG [key=value …]           on every node: what it is like
    python -m engine.launching.preflight measure CONFIG [key=value …]        the same, with the speed of its disk
    python -m engine.launching.preflight judge NEED_GPUS SINCE NODE,NODE…    what they told, on stdin: who is fit
    python -m engine.launching.preflight together NEED_GPUS                  on every rank: computes and communicates
    python -m engine.launching.preflight agree NEED_GPUS PER_NODE NODE,NODE… what those told, on stdin: who is fit

The judges print a line per node, `fit NODE` or `bad NODE WHY`.  A node that says nothing is bad: nobody else has to
notice that it is gone.  What must be equal is held against what most nodes have, so that the odd one is named whichever
comes first; what is a matter of degree against the median.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

from engine.launching.node import about_node

CLOCK_SECONDS = 5.0                        # that a node's clock may be off, besides what the question took
LEAST_SHARE = 0.4                          # of the median: slower, or with less memory, is too little, unless it is …
DEGREES = {"host_memory": ("GB of host memory free", 1e9, 64e9),                   # … so much, which suffices
           "disk_speed": ("MB/s to the disk", 1e6, 200e6)}
STAGES = {"started": "did not start", "met": "does not reach the first node",
          "computed": "a matrix product did not end",
          **dict.fromkeys(("even", "odd", "ring"), "an all-reduce with its neighbour did not end"),
          "all": "the all-reduce over all nodes did not end"}
MEASURED = {("computed",): "{:,.1f} TFLOP/s in a matrix product",
            ("even", "odd", "ring"): "{:,.2f} GB/s with its neighbours",
            ("all",): "{:,.2f} GB/s over all nodes"}

Told = Mapping[str, Any]


def judge(told: Iterable[Told], nodes: Sequence[str], need_gpus: int, since: float, until: float) -> dict[str, str]:
    """Why each node is not fit; empty for those that are.

    Args:
        told: what the nodes that answered said (`about_node`).
        nodes: all that were asked.
        need_gpus: that each must have; with 0 no degrees are compared, for nodes without GPUs may be shared.
        since, until: when they were asked, by the clock of the first.
    """
    by_node = {each["node"]: each for each in told}
    verdicts = {node: _alone(by_node.get(node), need_gpus, since, until) for node in nodes}
    well = [by_node[node] for node, verdict in verdicts.items() if not verdict]
    usual = _most_common([each["equal"] for each in well])
    middle = {name: _median(each.get(name) for each in well) for name in DEGREES}
    for each in well:
        verdicts[each["node"]] = _differs(each["equal"], usual) or (_less(each, middle) if need_gpus else "")
    return verdicts


def _alone(told: Told | None, need_gpus: int, since: float, until: float) -> str:
    if told is None:
        return "does not answer"
    if told["gpus"] < need_gpus:
        return f"has {told['gpus']} GPUs of {need_gpus}"
    off = max(since - told["time"], told["time"] - until)
    if off > CLOCK_SECONDS:
        return f"its clock is {off:,.0f} s {'behind' if told['time'] < since else 'ahead'}"
    return "; ".join(told["problems"])


def _differs(equal: Told, usual: Told) -> str:
    """What is not as most have it."""
    return "; ".join(f"{name} is {_said(equal.get(name))}, most nodes have {_said(usual.get(name))}"
                     for name in sorted(equal.keys() | usual.keys()) if equal.get(name) != usual.get(name))


def _less(told: Told, middle: Mapping[str, float]) -> str:
    return "; ".join(f"has {told[name] / unit:,.1f} {what}, the median is {middle[name] / unit:,.1f}"
                     for name, (what, unit, enough) in DEGREES.items()
                     if told.get(name) is not None and told[name] < min(enough, LEAST_SHARE * middle[name]))


def judge_together(told: Iterable[Told], nodes: Sequence[str], per_node: int,
                   compared: bool = True) -> dict[str, str]:
    """Why each node is not fit after what ranks did together (`engine.launching.together`); empty for those that are.

    A node that hangs takes its neighbour with it, and then all: so only the first stage counts that somebody did not
    reach.  A node that is slow makes its neighbours so; but each has two, in different rounds, and it is the better
    round that counts.

    Args:
        told: a line for each rank and stage.
        nodes: all that take part, in the order of their ranks.
        per_node: ranks on each.
        compared: a slow one is bad; not on CPUs, which others may share.
    """
    lines = list(told)
    verdicts = dict.fromkeys(nodes, "") | {each["node"]: each["wrong"] for each in lines if each.get("wrong")}
    reached = Counter((each["node"], each["stage"]) for each in lines)
    for stage, what in STAGES.items():
        late = [node for node in nodes if reached[node, stage] < per_node]
        if stage == "met" and len(late) == len(nodes) - 1 > 1:
            late, what = list(nodes[:1]), "nobody reaches it"
        if late:
            return verdicts | {node: verdicts[node] or what for node in late}
    for stages, speeds in speeds_of(lines).items() if compared else ():
        middle = _median(speeds.values())
        for node, speed in speeds.items():
            if speed < LEAST_SHARE * middle:
                verdicts[node] = verdicts[node] or f"only {MEASURED[stages].format(speed)}; the median is {middle:,.2f}"
    return verdicts


def neighbours(stage: str, nodes: int) -> list[tuple[int, int]]:
    """The pairs of a round.  Those of all rounds make a ring, so that every node has two neighbours."""
    if stage == "ring":
        return [(nodes - 1, 0)] if nodes > 2 else []
    return [(first, first + 1) for first in range(int(stage == "odd"), nodes - 1, 2)]


def speeds_of(lines: Iterable[Told]) -> dict[tuple[str, ...], dict[str, float]]:
    """By what was measured: each node's speed, that of its slowest rank in the better of the rounds."""
    slowest: dict[tuple[str, str], float] = {}
    for each in lines:
        if each.get("speed") is not None:
            key = each["stage"], each["node"]
            slowest[key] = min(each["speed"], slowest.get(key, float("inf")))
    return {stages: {node: max(slowest[stage, node] for stage in stages if (stage, node) in slowest)
                     for node in sorted({node for stage, node in slowest if stage in stages})} for stages in MEASURED}


def _summary(lines: Sequence[Told]) -> str:
    """`612.1 … 640.3 TFLOP/s in a matrix product, …`."""
    return ", ".join(f"{MEASURED[stages].format(min(speeds.values()))} (median {_median(speeds.values()):,.2f})"
                     for stages, speeds in speeds_of(lines).items() if speeds)


def _most_common(found: Sequence[Told]) -> Told:
    """What most have; of several that as many have, the first."""
    counts = Counter(json.dumps(each, sort_keys=True) for each in found)
    return json.loads(counts.most_common(1)[0][0]) if counts else {}


def _median(values: Iterable[float | None]) -> float:
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else 0.0


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value or "none")


def read_lines(text: Iterable[str]) -> list[Told]:
    """The objects among the lines; whatever else a node prints is passed over."""
    found: list[Told] = []
    for line in text:
        with contextlib.suppress(ValueError):
            if isinstance(each := json.loads(line), dict) and "node" in each:
                found.append(each)
    return found


def main(arguments: Sequence[str]) -> int:
    """See the top of this file."""
    what, *rest = arguments
    if what in ("tell", "measure"):
        print(json.dumps(about_node(rest[0], rest[1:], disk=what == "measure")), flush=True)
    elif what == "together":
        import_module("engine.launching.together").together("cuda" if int(rest[0]) else "cpu")
    else:
        told, until = read_lines(sys.stdin), time.time()
        if what == "judge":
            verdicts = judge(told, rest[2].split(","), int(rest[0]), float(rest[1]), until)
        else:
            verdicts = judge_together(told, rest[2].split(","), int(rest[1]), compared=int(rest[0]) > 0)
            if said := _summary(told):
                print(f"preflight: at least {said}", file=sys.stderr)
        for node, verdict in verdicts.items():
            print(f"bad {node} {verdict}" if verdict else f"fit {node}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
