"""Going back in a run's folder: by hand (`octant rewind`), and by a run that has met with an anomaly.

What lies behind the checkpoint that the run goes on from moves to `earlier-1` …, as always when a run begins another
line (`engine.train.run_folder`); what is left out of the data from there is remembered (`engine.reliability.rewind`).
First the move, then the memory: whoever is killed in between meets the same anomaly again, and goes back once more.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.checkpoint.folder import CHECKPOINTS, committed_steps
from engine.config import Config
from engine.distributed.agree import Group, rank_in, share_json
from engine.metrics.events import append_event
from engine.reliability.rewind import Rewind, choose, make, remember, remembered, with_rewinds
from engine.train.run_folder import begin_another_line, writing


@dataclass(frozen=True)
class Plan:
    """Where a run goes back to, and the global batches [first, stop) that it leaves out from then on."""

    from_step: int
    to_step: int
    first: int
    stop: int
    why: str


class GoBack(Exception):
    """Leaves the loop on every rank; the run goes on from `plan.to_step`."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan.why)
        self.plan = plan


def plan_rewind(config: Config, anomaly: int, at: int, why: str, group: Group) -> Plan | None:
    """What to do about an anomaly that began at step `anomaly`; None: nothing that has not been tried before.

    Every rank of `group` must call this; all get the same answer.
    """
    rewind, run_dir, found = config.reliability.rewind, Path(config.run.dir), None
    if rank_in(group) == 0 and rewind is not None:
        found = choose(anomaly, at, list(committed_steps(run_dir / CHECKPOINTS)), rewind, remembered(run_dir))
    found = share_json(found, group)
    if found is None:
        return None
    to_step, first, stop = found
    return Plan(at, to_step, first, stop, why)


def go_back(config: Config, plan: Plan, group: Group) -> Config:
    """Does it, and returns the configuration to go on with; every rank of `group` must call this.

    Raises:
        RequestError: the run's folder cannot be changed.
    """
    run_dir = Path(config.run.dir)
    if rank_in(group) == 0:
        rewind_folder(run_dir, make(config, plan.from_step, plan.to_step, (plan.first, plan.stop), plan.why))
    share_json(None, group)                                  # nobody reads the folder before it is ready
    return with_rewinds(config.with_changes(checkpoint={"resume": "auto"}))


def rewind_folder(run_dir: Path, rewind: Rewind) -> Path | None:
    """Moves what is later out of the way, remembers the rewind and notes the event; the folder must be locked.

    Returns:
        Where the later part is now; None if there was none.

    Raises:
        RequestError: the folder cannot be changed.
    """
    earlier = begin_another_line(run_dir, rewind.to_step)
    with writing(run_dir):
        remember(run_dir, rewind)
        append_event(run_dir, "rewind", rewind.from_step,
                     {"to_step": rewind.to_step, "skip": list(rewind.skip), "why": rewind.why})
    return earlier
