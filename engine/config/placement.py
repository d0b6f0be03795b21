"""Which model lives where: every role's ranks and layout, worked out and checked before a process starts.

    actor       roles.actor.ranks, roles.actor.parallel; where they say nothing, all ranks and `parallel`
    rollout     the actor's weights in the layout that makes texts: `roles.rollout`, on ranks of its own, or on the
                actor's ranks `roles.actor.generate`, by default the actor's own cut
    critic      foresees rewards; ppo only
    reference   what the actor began as; only where a distance from it counts
    reward …    one for each entry of `roles.reward` that is a model

What a role leaves out is the actor's.  A job has as many processes as the highest rank that a role names asks for, and
as the layout of an actor on all ranks does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from engine.config.model import ModelConfig
from engine.config.parallel import ParallelConfig
from engine.config.rl import CRITIC_OBJECTIVES, GROUP_OBJECTIVES, RL_OBJECTIVES, Place, RoleConfig
from engine.config.schema import Config

ACTOR, ROLLOUT, CRITIC, REFERENCE, REWARD = "actor", "rollout", "critic", "reference", "reward"


@dataclass(frozen=True)
class Asked:
    """A role as the configuration asks for it.

    Attributes:
        where: as messages name it.
        texts: it works through so many texts at a time; 0: it makes them.
        model: what it is.
    """

    name: str
    where: str
    ranks: range
    parallel: ParallelConfig
    texts: int
    model: ModelConfig


def learns_from_own_texts(config: Config) -> bool:
    """Whether the run has roles."""
    return config.run.objective in RL_OBJECTIVES


def needs_reference(config: Config) -> bool:
    """Whether the distance from a reference counts in what is learned."""
    target = config.ppo.kl_target if config.run.objective in CRITIC_OBJECTIVES else None
    return config.learning.kl_coef > 0 or target is not None


def processes_needed(config: Config) -> int | None:
    """How many processes the roles ask for; None: as many as one likes, by `parallel.data: auto` of the actor."""
    roles = config.roles
    places: list[Place] = [roles.actor, *([roles.critic] if config.run.objective in CRITIC_OBJECTIVES else []),
                           *([roles.reference] if needs_reference(config) else []),
                           *(source for source in roles.reward if source.load is not None),
                           *([roles.rollout] if roles.rollout is not None else [])]
    highest = max(place.range_of(range(0)).stop for place in places)
    actor = roles.actor.parallel or config.parallel
    if roles.actor.ranks not in (None, "all"):
        return highest
    if isinstance(actor.data, int):
        return max(highest, actor.world_size)
    return highest or None


def roles_asked(config: Config, world_size: int) -> list[Asked]:
    """All roles of a run on so many ranks, the actor first; layouts are as they stand, `data: auto` among them."""
    roles, texts = config.roles, config.texts_per_step
    actor_ranks = roles.actor.range_of(range(world_size))
    actor_parallel = roles.actor.parallel or config.parallel
    everywhere = range(world_size)

    def asked(name: str, where: str, place: RoleConfig, size: int, head: str = "language_model") -> Asked:
        ranks = place.range_of(everywhere if place.ranks == "all" else actor_ranks)
        model = place.model or config.model.model_copy(update={"head": head})
        return Asked(name, where, ranks, place.parallel or actor_parallel, size, model)

    found = [Asked(ACTOR, "roles.actor", actor_ranks, actor_parallel, config.learning.minibatch, config.model)]
    making = roles.rollout or Place(parallel=roles.actor.generate)
    found.append(Asked(ROLLOUT, "roles.rollout" if roles.rollout else "roles.actor.generate",
                       making.range_of(everywhere if making.ranks == "all" else actor_ranks),
                       for_generation(making.parallel or actor_parallel), 0, config.model))
    if config.run.objective in CRITIC_OBJECTIVES:
        found.append(asked(CRITIC, "roles.critic", roles.critic, config.learning.minibatch, "score"))
    if needs_reference(config):
        found.append(asked(REFERENCE, "roles.reference", roles.reference, texts))
    for number, source in enumerate(roles.reward):
        if source.load is not None:
            found.append(asked(reward_name(number), "roles.reward", source, texts, "score"))
    return found


def reward_name(number: int) -> str:
    """The role of an entry of `roles.reward`, counted from 0."""
    return REWARD if number == 0 else f"{REWARD}{number + 1}"


def offloaded(config: Config) -> set[str]:
    """The roles that are in host memory while they have nothing to do; with the actor goes what makes texts, which
    gets its weights from it before each use."""
    roles = config.roles
    asked: dict[str, RoleConfig] = {ACTOR: roles.actor, CRITIC: roles.critic, REFERENCE: roles.reference} | {
        reward_name(number): source for number, source in enumerate(roles.reward)}
    found = {name for name, role in asked.items() if role.offload}
    return found | {ROLLOUT} if ACTOR in found and not config.rollout.async_steps else found


def for_generation(parallel: ParallelConfig) -> ParallelConfig:
    """The same cut of the weights, as texts are made with it: one chunk per stage, no part of the sequence apart."""
    return ParallelConfig(tensor=parallel.tensor, pipeline=parallel.pipeline, sequence=False, zero=0)


def as_role(config: Config, asked: Asked) -> Config:
    """The run's configuration as a role sees it: its layout, and batches of what it works through at a time."""
    sizes = {"global": asked.texts} if asked.texts else {"micro": 1, "global": len(asked.ranks)}
    parallel = asked.parallel.model_dump(mode="json", by_alias=True)
    model, batch = asked.model.model_dump(mode="json", by_alias=True), config.batch.model_dump(by_alias=True)
    values = config.to_dict() | {"model": model, "parallel": parallel, "batch": batch | sizes}
    values["run"] = values["run"] | {"objective": "pretrain"}
    values["data"] = values["data"] | {"train": [], "valid": []}
    values["reliability"] = values["reliability"] | {"inject": None}             # its phases are those of the run
    return Config.model_validate(values)


def placed(config: Config, layouts: Mapping[str, ParallelConfig], asked: list[Asked]) -> Config:
    """The configuration with every role's ranks and layout written out."""
    by_name = {role.name: role for role in asked}

    def written(name: str) -> dict[str, object]:
        ranks = by_name[name].ranks
        return {"ranks": f"{ranks.start}:{ranks.stop}", "parallel": layouts[name].model_dump(mode="json")}

    roles = config.roles.model_dump(mode="json", by_alias=True)
    for name in (ACTOR, CRITIC, REFERENCE):
        roles[name] |= written(name) if name in by_name else {}
    for number, entry in enumerate(roles["reward"]):
        entry |= written(reward_name(number)) if reward_name(number) in by_name else {}
    if roles["rollout"] is None:
        roles["actor"]["generate"] = layouts[ROLLOUT].model_dump(mode="json")
    else:
        roles["rollout"] |= written(ROLLOUT)
    parallel = layouts[ACTOR].model_dump(mode="json", by_alias=True)
    return Config.model_validate(config.to_dict() | {"roles": roles, "parallel": parallel})


def overall_problems(config: Config, asked: list[Asked], world_size: int) -> Iterator[str]:
    """What is wrong with the roles together."""
    needed = processes_needed(config)
    if needed is not None and needed != world_size:
        yield f"the roles take {needed} processes, the job has {world_size}: start {needed}, or change roles.*.ranks"
    for role in asked:
        if role.ranks.stop > world_size:
            yield (f"{role.where}.ranks {role.ranks.start}:{role.ranks.stop} reaches beyond the last of {world_size} "
                   "processes")
    for rank in range(world_size):
        if not any(rank in role.ranks for role in asked):
            yield f"no role lives on rank {rank}: give it one, or start fewer processes"
            break
    if config.rollout.async_steps and config.roles.rollout is None:
        yield ("rollout.async_steps(1) makes texts while the actor learns, on ranks of its own: name them in "
               "roles.rollout")
    if config.rollout.async_steps:
        making = next(role.ranks for role in asked if role.name == ROLLOUT)
        others = [role for role in asked if role.name != ROLLOUT and role.ranks.stop > making.start]
        if others:
            yield (f"rollout.async_steps(1) needs roles.rollout.ranks that are the last of the job and nobody else's; "
                   f"they begin with {making.start}, and {others[0].where} is on {others[0].ranks.start} to "
                   f"{others[0].ranks.stop - 1}")
        if config.run.objective in GROUP_OBJECTIVES and config.grpo.dynamic_sampling:
            yield (f"grpo.dynamic_sampling({config.grpo.dynamic_sampling}) makes groups anew once they are scored, and "
                   "with rollout.async_steps(1) the next step's are being made then: set one of them to 0")
