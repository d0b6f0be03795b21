"""Where a run that learns from its own texts starts from: its newest checkpoint, or what its roles begin with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from engine.checkpoint.compatibility import Difference, require_compatible
from engine.checkpoint.metadata import CARRIED
from engine.config import Config
from engine.config.rl import CRITIC_OBJECTIVES
from engine.data.skipping import require_same_past
from engine.distributed.agree import Group
from engine.distributed.mesh import Job
from engine.distributed.topology import Topology
from engine.errors import CheckpointError
from engine.metrics.phases import Phases
from engine.rl.ahead import learners, responses_in
from engine.rl.cast import Cast, require_no_adapter
from engine.rl.coefficients import KLCoefficient
from engine.rl.function_scorer import open_scorers
from engine.rl.loop import Carried, Learner
from engine.rl.making import RoleMaker
from engine.rl.pretraining import Pretraining
from engine.rl.prompts import Prompts
from engine.rl.rollout_log import RolloutLog
from engine.rl.rollouts import PromptSource, Rollouts, Scorer
from engine.rl.texts import Texts
from engine.train.running import Tools
from engine.train.start import find_start, leave_other_line, note_changes, require_same_windows
from engine.train.state import TrainState


def start(config: Config, job: Job, source: PromptSource, scorers: Sequence[Scorer], num_ids: int,
          stop_ids: Collection[int], stop_requested: Callable[[], bool], stamped: bool = False,
          phases: Phases | None = None, told: Callable[[Rollouts], None] | None = None) -> Learner:
    """Builds this rank's part of the run and takes over the checkpoint it goes on from; every rank must call this.

    Args:
        config: resolved.
        num_ids, stop_ids: of the tokenizer: how many ids it has, and which end a text.
        told: hears of every step's texts, on rank 0; None: some are written to `rollouts.jsonl`.

    Raises:
        RequestError: the run's folder cannot be written, or a place for metrics cannot be used.
        CheckpointError: a checkpoint was asked for, or is there, and none can be used; or a role's weights cannot be.
        ConfigError: a placement is impossible.
    """
    require_no_adapter(config)
    phases = phases or Phases(job.device)
    world = job.mesh(Topology(data=job.size))
    cast = Cast.build(config, job, num_ids)
    fingerprint = source.fingerprint()
    notes, contents = cast.begin(config, fingerprint, world.world.group)
    state = TrainState(cast.trained, end_ids=tuple(sorted(stop_ids)), updates=0)
    carried = Carried(_coefficient(config), contents=contents)
    more, carried = _take_over(state, carried, cast, config, fingerprint, world.world.group)
    learning = learners(config, job)
    maker = RoleMaker(cast, config, job, num_ids, stop_ids)
    buckets = [bucket for role in cast.trained if role.model is not None for bucket in role.model.buckets]
    tools = Tools.of(config, world, state.step, buckets, phases, stamped, [*notes, *more])
    if told is None:
        told = RolloutLog(Path(config.run.dir), state.step, tools.journal.warning) if world.rank == 0 else _unheard
    return Learner(config=config, mesh=world, state=state, tools=tools, stop_requested=stop_requested, phases=phases,
                   cast=cast, learning=learning, maker=maker,
                   texts=Texts(config, cast, source, maker, scorers, world.world, learning, phases),
                   carried=carried, fingerprint=fingerprint, told=told, pretraining=Pretraining.open(config),
                   saved_step=state.step if state.step else -1)


def begin(config: Config, stop_requested: Callable[[], bool], stamped: bool) -> Callable[[Job, Phases], Learner]:
    """Opens what a run learns from; what is returned makes the run of the job that has come together.

    Raises:
        DataError, ConfigError, RequestError: prompts or reward functions cannot be used.
    """
    prompts = Prompts.open(config)

    def started(job: Job, phases: Phases) -> Learner:
        learning = learners(config, job)
        scorers = [] if learning is None else open_scorers(config, learning.group)
        return start(config, job, prompts, scorers, prompts.tokenizer.vocab_size,
                     prompts.end_ids, stop_requested, stamped, phases)

    return started


def _unheard(rollouts: Rollouts) -> None:
    """For the ranks that do not write."""


def _coefficient(config: Config) -> KLCoefficient:
    if config.run.objective in CRITIC_OBJECTIVES:
        return KLCoefficient(config.ppo.kl_coef, config.ppo.kl_target, config.ppo.kl_horizon)
    return KLCoefficient(config.grpo.kl_coef)


def _take_over(state: TrainState, carried: Carried, cast: Cast, config: Config, fingerprint: dict[str, object],
               group: Group) -> tuple[list[str], Carried]:
    """What `checkpoint.resume` asks for, over the weights that the roles began with."""
    reader, notes = find_start(config, group, state.pieces())
    differing: list[Difference] = []
    if reader is not None:
        saved = reader.metadata
        if "state" not in saved or CARRIED not in saved:
            raise CheckpointError(f"{reader.path} is not of a run of {config.run.objective}: start a run from it with "
                                  "roles.actor.load")
        differing = require_compatible(saved, state.metadata(config, fingerprint), reader.path)
        require_same_windows(reader, config)
        require_same_past(saved.get("data", {}).get("skip", ()), config.data.skip,
                          int(saved[CARRIED]["next_prompt"]), f"{reader.path}: ")
        cast.require_same(saved[CARRIED].get("contents", {}), carried.contents, Path(reader.path))
        state.load(reader)
        ahead, why_not = responses_in(reader, config)
        carried = carried.restored(saved[CARRIED], ahead)
        notes = [*notes, *([why_not] if why_not else ()),
                 *(f"changed since the checkpoint: {difference}" for difference in differing),
                 f"resumed from {reader.path} (step {state.step}, {carried.next_prompt} prompts consumed)"]
    notes = [*notes, *leave_other_line(config, state, reader, group)]
    note_changes(config, state.step, differing, group)
    return notes, replace(carried)
