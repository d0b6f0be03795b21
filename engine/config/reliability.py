"""The section `reliability`: what a run survives, when it gives up, and the faults it may be rehearsed with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field

from engine.config.fields import Count, NameOf, NonNegative, Positive, Section, Signed
from engine.config.phases import LOG, PHASES, phases_of

OF_SAVES = ("disk_full", "stalled_writer")                   # they strike whichever save comes next, in no phase


class FaultConfig(Section):
    """A fault to inject: what, on which rank, in which step, when the phase begins (`engine.reliability.inject`)."""

    kind: Literal["kill", "segfault", "exit", "terminate", "stop", "hang", "raise", "nan", "slow", "bit_flip",
                  "network_drop", "clock_jump", "disk_full", "stalled_writer", "damage"]
    rank: NonNegative = 0
    step: NonNegative = 1                                    # counted from 1
    phase: Annotated[str, NameOf("phase", PHASES)] = "forward_backward"       # one that the run has
    seconds: Signed = 5.0                                    # of `slow`, `clock_jump` (or back), `stalled_writer`
    steps: Count = 1                                         # in a row
    every_time: bool = False                                 # again when a restart comes by; else once in a run.dir


def fault_problems(faults: Sequence[FaultConfig], objective: str) -> Iterator[str]:
    """Which of these faults would never strike a run of `run.objective`, or not as they should."""
    kind = phases_of(objective)
    known = (*kind.in_step, *kind.besides, LOG)
    for fault in faults:
        if fault.kind not in OF_SAVES and fault.phase not in known:
            yield (f"reliability.inject: a run of {objective} has no phase {fault.phase}, and the {fault.kind} would "
                   f"never strike; its phases are {', '.join(known)}")
        if fault.kind == "nan" and "reduce" not in known:
            yield (f"reliability.inject: nan is taken back as gradients are reduced, a phase that {objective} does not "
                   "have: use another kind")


class SpikeConfig(Section):
    """Loss and gradient norm against their latest values (`engine.reliability.spikes`)."""

    z: Positive = 6.0                                        # robust standard deviations above the median
    window: Annotated[Count, Field(ge=8, le=100_000)] = 128  # steps that are compared with
    action: Literal["warn", "skip", "rewind"] = "warn"       # skip: the step changes nothing


class RewindConfig(Section):
    """Going back before an anomaly and leaving out the data around it (`engine.reliability.rewind`)."""

    steps: Count = 100                                       # at least so far back, if there is a checkpoint
    skip_batches: Count = 300                                # global batches to leave out from there on
    tries: Count = 3                                         # from one place; then the run gives up


class WatchdogConfig(Section):
    """Seconds that a rank may stay in one phase (`engine.reliability.watchdog`)."""

    step_factor: Positive = 5.0                              # in a step: times the median step of this run, but
    min_seconds: Positive = 60.0                             # at least this
    start_seconds: Positive = 900.0                          # up to the end of the first step, and of an evaluation
    save_seconds: Positive = 900.0                           # in a save
    drain_seconds: Positive = 540.0                          # from a request to stop to the end, before it is cut short


class ReliabilityConfig(Section):
    """What a run survives, and when it gives up."""

    watchdog: WatchdogConfig | None = WatchdogConfig()       # null: only the collectives' timeout of ten minutes
    on_nonfinite: Literal["skip", "stop"] = "skip"           # a gradient that is not finite: stop gives up at once
    max_grad_norm: Positive | None = None                    # a step whose gradient is larger changes nothing
    spike: SpikeConfig | None = SpikeConfig()                # null: nobody looks
    rewind: RewindConfig | None = RewindConfig()             # null: it gives up instead
    max_skips: NonNegative = 10                              # steps skipped in a row; more: rewind.  0: any number
    straggler_factor: Annotated[Positive, Field(gt=1)] | None = 1.5      # own time of a step over the median rank's
    max_restarts_without_progress: NonNegative = 3           # of a job, by launch/*.sh, without another checkpoint
    inject: tuple[FaultConfig, ...] | None = None            # faults, to see what happens; or OCTANT_INJECT
