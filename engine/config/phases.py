"""The phases of a step, by what a run learns from: what is timed and watched, and where faults may be injected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.config.rl import RL_OBJECTIVES


@dataclass(frozen=True)
class StepPhases:
    """The names of phases (`engine.metrics.phases`).

    Attributes:
        in_step: of every step, in order: the first begins it, the last ends it.
        besides: of hooks, those that take time.
    """

    in_step: tuple[str, ...]
    besides: tuple[str, ...]

    def timing(self, seconds: Mapping[str, float], steps: int) -> dict[str, float]:
        """The metrics that say the seconds of so many steps went: means of a step, and sums besides."""
        return {f"timing_s/{name}": seconds.get(name, 0.0) / divisor
                for names, divisor in ((self.in_step, steps), (self.besides, 1)) for name in names}


LOG = "log"                                                  # also a hook's, in every run; it takes no time
OF_CORPORA = StepPhases(("load", "forward_backward", "reduce", "update", "publish", "read"),
                        ("check_replicas", "evaluate", "save"))
OF_OWN_TEXTS = StepPhases(("reshard", "gen", "reward", "old_log_prob", "ref", "values", "adv", "update_critic",
                           "update_actor", "read"), ("save",))
KINDS = (OF_CORPORA, OF_OWN_TEXTS)
PHASES: Mapping[str, None] = dict.fromkeys(
    name for kind in KINDS for name in (*kind.in_step, *kind.besides, LOG))


def phases_of(objective: str) -> StepPhases:
    """Those of a run of `run.objective`."""
    return OF_OWN_TEXTS if objective in RL_OBJECTIVES else OF_CORPORA
