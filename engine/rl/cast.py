"""Who plays: the roles of a run, built in one order on every rank, and the weights that they begin with.

    actor      trained by its own texts              roles.actor.load, or checkpoint.load
    critic     trained to foresee what texts earn    its own, or the actor's with a head of zeros; ppo only
    reference  what the actor began as               its own, or the actor's; only where the distance from it counts
    reward …   scores                                each its own

Weights of roles that are not trained are in no checkpoint: they are read at every start from where they were, and must
be the same each time, by the hash of what they are read from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.checkpoint.adapted import open_model
from engine.checkpoint.compatibility import require_compatible
from engine.checkpoint.read import CheckpointReader
from engine.config import Config, RoleConfig, role_configs
from engine.config.placement import ACTOR, CRITIC, REFERENCE, REWARD, ROLLOUT, offloaded, reward_name
from engine.distributed.agree import Group
from engine.distributed.mesh import Job
from engine.errors import CheckpointError, ConfigError
from engine.generate.score import Scale
from engine.model.adapter import SCORE
from engine.model.objective import NEXT_TOKEN, Objective
from engine.rl.objectives import Policy, Value
from engine.train.role import Role, RoleState

SCORE_KEY = f"model.{SCORE}"

RAW = ("warning: {name}: the run of {path} evaluated nothing on data.valid, so its scores have no known mean and they "
       "count raw, however large, beside kl_coef, penalties and other rewards; give that run data.valid "
       "and eval.every, or set reward_norm")


@dataclass(frozen=True)
class Member:
    """A role on this rank.

    Attributes:
        ranks: where it lives.
        config: the run's configuration as it sees it.
    """

    ranks: range
    config: Config
    state: RoleState

    @property
    def uses(self) -> int:
        """How often a pass asks for each microbatch on this rank."""
        return 1 if self.state.model is None else len(self.state.model.chunks)


@dataclass(frozen=True)
class Cast:
    """All roles of a run, by name.

    Attributes:
        scales: of reward models whose run held samples back: their scores count in standard deviations from the mean
            over those.
    """

    members: Mapping[str, Member]
    scales: dict[str, Scale] = field(default_factory=dict)

    @staticmethod
    def build(config: Config, job: Job, num_ids: int | None = None) -> Cast:
        """Every rank of the job must call this.

        Args:
            num_ids: of the tokenizer: no others are chosen; None: as many as the model has.

        Raises:
            ConfigError: a placement is impossible.
        """
        objectives: dict[str, Objective] = {ACTOR: Policy(config.learning, config.rollout.temperature, num_ids),
                                            CRITIC: Value(config.ppo.value_clip)}
        members: dict[str, Member] = {}
        resting = offloaded(config)
        for name, (ranks, own) in role_configs(config, job.size).items():
            optim = config.critic_optim if name == CRITIC else config.optim
            role = Role(name, own.model, own.parallel, ranks, trainable=name in objectives,
                        objective=objectives.get(name, NEXT_TOKEN), optim=optim, offload=name in resting,
                        refilled=name == ROLLOUT and not config.rollout.delta)
            members[name] = Member(ranks, role.config(own), RoleState.build(role, own, job))
        return Cast(members)

    def __getitem__(self, name: str) -> Member:
        return self.members[name]

    def __contains__(self, name: str) -> bool:
        return name in self.members

    @property
    def trained(self) -> tuple[RoleState, ...]:
        """The states of the roles that learn, the actor's first."""
        return tuple(self.members[name].state for name in (ACTOR, CRITIC) if name in self.members)

    def scoring(self, config: Config) -> list[tuple[str, float]]:
        """Names and weights of the reward models."""
        return [(reward_name(number), source.weight) for number, source in enumerate(config.roles.reward)
                if source.load is not None]

    def begin(self, config: Config, data: Mapping[str, Any], group: Group) -> tuple[list[str], dict[str, str]]:
        """Gives every role the weights it begins with; every rank must call this, in the same order.

        Args:
            data: what identifies the prompts, and the tokenizer that all roles must share.

        Returns:
            What a person should know, and the hash of what each role's weights were read from.

        Raises:
            CheckpointError: what a role should be read from is not there, is another model, or has another tokenizer.
        """
        notes: list[str] = []
        contents: dict[str, str] = {}
        for name, member in self.members.items():
            if name == ROLLOUT:
                continue
            with member.state.at_work(learning=True):
                member.state.initialise(config.run.seed)
            source = self._source(config, name)
            if name == CRITIC:
                _clear_score(member.state)
            if source is not None:
                reader = open_model(Path(source), group)
                notes += _load(name, member, reader, data)
                contents[name] = reader.content
                if name.startswith(REWARD):
                    if (scale := Scale.of(reader)) is not None:
                        self.scales[name] = scale
                    else:
                        notes.append(RAW.format(name=name, path=reader.path))
            member.state.publish()
        return notes, contents

    def _source(self, config: Config, name: str) -> str | None:
        """Where a role's weights come from."""
        roles = config.roles
        actor = roles.actor.load or config.checkpoint.load
        if name == ACTOR:
            return actor
        asked: dict[str, RoleConfig] = {CRITIC: roles.critic, REFERENCE: roles.reference} | {
            reward_name(number): each for number, each in enumerate(roles.reward)}
        return asked[name].load or actor

    def require_same(self, saved: Mapping[str, str], contents: Mapping[str, str], where: Path) -> None:
        """
        Raises:
            CheckpointError: a role that is not trained was another model in the run that goes on.
        """
        for name, content in contents.items():
            if not self.members[name].state.role.trainable and saved.get(name, content) != content:
                raise CheckpointError(f"{where}: roles.{name} was another model (its manifest had the hash "
                                      f"{saved[name][:12]}…, now it is {content[:12]}…): give back that one, or begin "
                                      "another run with checkpoint.load and another run.dir")


def _clear_score(state: RoleState) -> None:
    """A new critic expects nothing of any text."""
    for piece in state.masters():
        if piece.key == SCORE_KEY:
            piece.tensor.zero_()


def _load(name: str, member: Member, reader: CheckpointReader, data: Mapping[str, Any]) -> list[str]:
    """Reads a role's weights; a critic without a score keeps its own."""
    own = {"config": member.config.to_dict(), "data": dict(data)}
    try:
        require_compatible(reader.metadata, own, reader.path, weights_only=True)
    except CheckpointError as error:
        raise CheckpointError(f"roles.{name}: {error}") from None
    if name.startswith(REWARD) and SCORE_KEY not in reader:
        raise CheckpointError(f"roles.reward: {reader.path} is no reward model: it has no score")
    state = member.state
    pieces = state.masters() if state.role.trainable else state.weights()
    reader.load_into([piece for piece in pieces if piece.key != SCORE_KEY or SCORE_KEY in reader], convert=True)
    return [f"{name}: weights from {reader.path}"]


def require_no_adapter(config: Config) -> None:
    """
    Raises:
        ConfigError: the run asks for adapters, which roles do not have.
    """
    if config.adapter is not None:
        raise ConfigError(f"run.objective {config.run.objective} trains whole models: leave adapter out")
