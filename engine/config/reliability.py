"""The section `reliability`: what a run survives, when it gives up, and the faults it may be rehearsed with."""

from __future__ import annotations

from typing import Literal

from engine.config.fields import Count, NonNegative, Number, Section


class FaultConfig(Section):
    """A fault to inject: what, on which rank, in which step, when the phase begins (`engine.reliability.inject`)."""

    kind: Literal["kill", "stop", "hang", "raise", "nan", "slow", "bit_flip", "network_drop", "clock_jump", "disk_full",
                  "stalled_writer"]
    rank: NonNegative = 0
    step: NonNegative = 1                                    # counted from 1
    phase: Literal["load", "forward_backward", "reduce", "update", "publish", "read", "check_replicas", "evaluate",
                   "log", "save"] = "forward_backward"
    seconds: Number = 5.0                                    # of `slow`, `clock_jump`, `stalled_writer`
    steps: Count = 1                                         # in a row
    every_time: bool = False                                 # again when a restart comes by; else once in a run.dir


class ReliabilityConfig(Section):
    """What a run survives, and when it gives up."""

    max_skips: NonNegative = 10                              # steps skipped in a row that end the run; 0: none do
    inject: tuple[FaultConfig, ...] | None = None            # faults, to see what happens; or OCTANT_INJECT
