"""Faults in a row, each survived: the run ends with the weights of one that nobody disturbed, to the last bit.

A group of faults strikes one run, one after the other, and every fault is a test of its own: that it has struck, that
what was said of it fits, and that the run it was part of ended as it should.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from engine.config import Config
from engine.metrics.events import Event, read_events
from engine.reliability.restarts import DONE
from tests.kit.attempts import Attempt, survive
from tests.kit.runs import assert_equal_tensors, run_config, tensors, train, trained

STEPS = 16


@dataclass(frozen=True)
class Fault:
    """A fault and what is to be seen of it.

    Attributes:
        inject: as `reliability.inject` takes it.
        said: part of why the attempt ended; None: it did not end.
        printed: part of what rank 0 prints.
    """

    inject: dict[str, Any]
    said: str | None = None
    printed: str = ""


@dataclass(frozen=True)
class Group:
    """Faults of one run of two ranks, in the order in which they strike; `long`: only with --chaos."""

    faults: dict[str, Fault]
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    long: bool = False


def deadly(said: str, kind: str, rank: int, step: int, phase: str, **more: Any) -> Fault:
    return Fault({"kind": kind, "rank": rank, "step": step, "phase": phase, **more}, said)


LOST = "failed first: "                    # one that is killed leaves no word; its peer says that it has lost it
FROZEN = "cannot even report: frozen, or the machine is gone (cause: hardware)"
ASKED_FOR = "stands at engine/reliability/inject.py"

GROUPS = {
    "deaths": Group({
        "killed before the first step": deadly(LOST, "kill", 1, 1, "load"),
        "killed in a step": deadly(LOST, "kill", 1, 3, "forward_backward"),
        "rank 0 killed in a step": deadly(LOST, "kill", 0, 4, "forward_backward"),
        "killed in the reduction": deadly(LOST, "kill", 1, 5, "reduce"),
        "killed in the update": deadly(LOST, "kill", 1, 6, "update"),
        "rank 0 killed as weights are published": deadly(LOST, "kill", 0, 7, "publish"),
        "killed as it saves": deadly(LOST, "kill", 1, 8, "save"),
        "rank 0 killed as it saves": deadly(LOST, "kill", 0, 10, "save"),
        "killed in an evaluation": deadly(LOST, "kill", 1, 12, "evaluate"),
        "segmentation fault": deadly(LOST, "segfault", 1, 13, "forward_backward"),
        "exit without a word": deadly(LOST, "exit", 1, 14, "load"),
        "killed as the line is logged": deadly(LOST, "kill", 0, 15, "log"),
    }, {"eval": {"every": 12, "batches": 1}, "parallel": {"data": 2, "zero": 1}}),
    "exceptions": Group({
        "exception in a step": deadly("rank 1 failed first: an exception, injected", "raise", 1, 3, "forward_backward"),
        "exception as samples are loaded": deadly("rank 0 failed first: an exception, injected", "raise", 0, 5, "load"),
        "exception as it saves": deadly("rank 1 failed first: an exception, injected", "raise", 1, 8, "save"),
        "network lost in a step": deadly(LOST, "network_drop", 1, 9, "forward_backward"),
        "network of rank 0 lost": deadly(LOST, "network_drop", 0, 11, "reduce"),
        "network lost as it saves": deadly(LOST, "network_drop", 1, 14, "save"),
    }, {"parallel": {"data": 2, "zero": 2}}),
    "flips": Group({
        "flipped bit before a save": deadly("ranks [0] ≠ [1]", "bit_flip", 1, 4, "load"),
        "flipped bit on rank 0": deadly("ranks [0] ≠ [1]", "bit_flip", 0, 7, "reduce"),
        "flipped bit as weights are published": deadly("ranks [0] ≠ [1]", "bit_flip", 1, 10, "publish"),
        "flipped bit behind the last save": deadly("ranks [0] ≠ [1]", "bit_flip", 1, 15, "read"),
    }, {"parallel": {"data": 2, "zero": 0}}),
    "disk": Group({
        "disk of rank 0 full": Fault({"kind": "disk_full", "rank": 0, "step": 2}, printed="step 2 was not saved: "),
        "disk of another rank full": Fault({"kind": "disk_full", "rank": 1, "step": 5}, printed="step 6 was not saved"),
        "save that stalls": Fault({"kind": "stalled_writer", "rank": 1, "step": 8, "seconds": 0.5}),
        "save that stalls on rank 0": Fault({"kind": "stalled_writer", "rank": 0, "step": 10, "seconds": 0.5}),
        "checkpoint damaged, then killed": Fault({"kind": "damage", "rank": 0, "step": 13},
                                                 printed="checkpoint of step 12 skipped, now step-00000012.corrup"),
        "killed on a damaged checkpoint": deadly(LOST, "kill", 1, 13, "update"),
    }, {"parallel": {"data": 2, "zero": 1}, "checkpoint": {"every": 2, "keep": 0, "async": False}}),
    "harmless": Group({
        "slow rank": Fault({"kind": "slow", "rank": 1, "step": 3, "seconds": 0.5, "steps": 4}, printed="slow: rank 1"),
        "slow in loading": Fault({"kind": "slow", "rank": 0, "step": 6, "seconds": 1.0, "phase": "load"}),
        "slow as it saves": Fault({"kind": "slow", "rank": 1, "step": 8, "seconds": 0.5, "phase": "save"}),
        "time leaps ahead": Fault({"kind": "clock_jump", "rank": 0, "step": 9, "seconds": 1e6}),
        "time leaps back": Fault({"kind": "clock_jump", "rank": 1, "step": 10, "seconds": -1e6}),
    }, {"parallel": {"data": 2, "zero": 3}}),
    "request": Group({
        "told to stop": Fault({"kind": "terminate", "rank": 1, "step": 5}, printed="stopped on request at a s"),
    }, {"parallel": {"tensor": 2}}),
    "hangs": Group({
        "frozen in a step": deadly(FROZEN, "stop", 1, 4, "forward_backward"),
        "rank 0 frozen": deadly(FROZEN, "stop", 0, 6, "reduce"),
        "frozen as it saves": deadly(FROZEN, "stop", 1, 8, "save"),
        "hang in loading": deadly(ASKED_FOR, "hang", 1, 9, "load"),
        "hang in the reduction": deadly(ASKED_FOR, "hang", 0, 11, "reduce"),
        "hang as it saves": deadly(ASKED_FOR, "hang", 1, 12, "save"),
        "hang in an evaluation": deadly(ASKED_FOR, "hang", 1, 14, "evaluate"),
    }, {"eval": {"every": 7, "batches": 1}, "parallel": {"data": 2, "zero": 1},
        "reliability": {"watchdog": {"min_seconds": 3, "start_seconds": 60, "save_seconds": 3}}}, long=True),
}
FAULTS = {name: (group, fault) for group, each in GROUPS.items() for name, fault in each.faults.items()}


@dataclass(frozen=True)
class Outcome:
    """What became of the run of a group."""

    config: Config
    whole: Config
    attempts: list[Attempt]
    printed: str
    events: list[Event]


@cache
def outcome(group: str, folder: Path) -> Outcome:
    folder.mkdir()
    sections = {"eval": {"every": 0}, "checkpoint": {"every": 2, "keep": 0}} | GROUPS[group].sections
    faults = [fault.inject for fault in GROUPS[group].faults.values()]
    reliability = sections.pop("reliability", {}) | {"max_restarts_without_progress": len(faults)}
    config, whole = (run_config(folder, name, steps=STEPS, **sections, reliability=reliability | {"inject": injected})
                     for name, injected in (("run", faults), ("whole", None)))
    attempts, printed = survive(config)
    if attempts[-1].verdict != DONE:
        more, also = survive(config)
        attempts, printed = [*attempts, *more], printed + also
    train(whole)
    return Outcome(config, whole, attempts, printed, read_events(Path(config.run.dir)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize("name", FAULTS)
def test_survived(name: str, folder: Path, request: pytest.FixtureRequest) -> None:
    group, fault = FAULTS[name]
    if GROUPS[group].long and not request.config.getoption("--chaos"):
        # each hang waits out the watchdog, 103 s in all: `make chaos` has them
        pytest.skip("waits for a watchdog's limit, which is long: --chaos (make chaos)")
    found = outcome(group, folder / group)
    [struck] = [at for at, event in enumerate(found.events) if event.kind == "injected" and event.detail["fault"] ==
                fault.inject["kind"] and (event.step, event.rank) == (fault.inject["step"], fault.inject["rank"])]
    failed = next((event.detail["what"] for event in found.events[struck:] if event.kind in ("failed", "start")
                   and "what" in event.detail), None)
    if fault.said is not None:
        assert failed is not None and fault.said in failed, (failed, found.printed)
    assert fault.printed in found.printed, found.printed
    assert found.attempts[-1].verdict == DONE, found.attempts
    assert_equal_tensors(tensors(found.config, STEPS), tensors(found.whole, STEPS))
    assert trained(found.config) == trained(found.whole)
