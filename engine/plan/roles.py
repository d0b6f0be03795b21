"""A run that learns from its own texts on paper: who lives where, and what every rank holds of all who live on it.

    actor, critic            weights, gradients, optimizer state; and in their turn activations and workspace
    reference, reward …      weights; and in their turn what a forward pass takes
    rollout                  weights once more, in the layout that makes texts; and in its turn keys and values of
                             `rollout.batch` texts of `data.seq_len` tokens, and the numbers from which a token is drawn

Roles on a rank take turns, so what a rank needs is all that stays, and the most that any of them takes in its turn.  A
role with `offload` does not stay: what it holds is of its turn too, and otherwise in host memory, but for gradients and
what makes texts, which are made anew.  What makes texts is still there while they are scored, and the actor's weights
are while it gets its own.
Layouts, stages and what a training step holds are those of `engine.plan.stages`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

from engine.config import Config, role_configs, world_size_of
from engine.config.placement import ACTOR, CRITIC, REWARD, ROLLOUT, offloaded
from engine.distributed.topology import Topology
from engine.model.flops import count_parameters
from engine.plan.devices import Device
from engine.plan.layer import FP32, Sizes, embedding_bytes, head_bytes, layer_bytes
from engine.plan.stages import CONTEXT, MARGIN, stage_memory
from engine.plan.state import StateBytes, dealt_layers, stage_state, width_of
from engine.plan.text import counted, memory_size, table

BAR = 48                                 # characters of a row of the picture
TRAINED = (ACTOR, CRITIC)


@dataclass(frozen=True)
class Part:
    """What one role takes of a rank's memory.

    Attributes:
        role: its name; `stage` of its pipeline, on which the rank is.
        state: what stays, or where it `rests`, comes and goes with it.
        turn: the most that comes and goes besides while it works.
        refilled: its weights are written anew before each use, and lie nowhere between.
    """

    role: str
    stage: int
    state: StateBytes
    turn: float
    rests: bool = False
    refilled: bool = False

    @property
    def on_host(self) -> int:
        """Bytes of host memory in which it rests."""
        return self.state.parameters + self.state.optimizer if self.rests and not self.refilled else 0

    @property
    def name(self) -> str:
        return f"{self.role} {self.stage}"


@dataclass(frozen=True)
class Place:
    """Ranks side by side on which the same lives.

    Attributes:
        parts: a role each, in the order in which they were asked for.
    """

    ranks: range
    parts: tuple[Part, ...]

    @property
    def staying(self) -> list[Part]:
        return [part for part in self.parts if not part.rests]

    @property
    def stays(self) -> int:
        return sum(part.state.total for part in self.staying)

    def turn(self, part: Part) -> float:
        """Bytes that come and go with a role."""
        resting = {each.role: each.state for each in self.parts if each.rests}
        own = part.turn + (part.state.total if part.rests else 0)
        if part.role == ROLLOUT and part.rests:
            return max(own, part.state.total + (resting[ACTOR].parameters if ACTOR in resting else 0))
        if part.role.startswith(REWARD) and ROLLOUT in resting:
            return own + resting[ROLLOUT].total
        return own

    @property
    def longest(self) -> Part:
        """The role that takes the most in its turn."""
        return max(self.parts, key=self.turn)

    @property
    def total(self) -> float:
        """Bytes of tensors at the worst moment."""
        return self.stays + self.turn(self.longest)

    @property
    def on_host(self) -> int:
        """Bytes of host memory for those who have nothing to do."""
        return sum(part.on_host for part in self.parts)

    @property
    def needed(self) -> float:
        """Bytes of a GPU's memory, with margin and context."""
        return self.total * (1 + MARGIN) + CONTEXT


@dataclass(frozen=True)
class PlannedRoles:
    """The resolved `config`, which has roles, on `device`."""

    config: Config
    device: Device

    @property
    def world(self) -> int:
        return world_size_of(self.config)

    @cached_property
    def roles(self) -> dict[str, tuple[range, Config]]:
        """Ranks and configuration of each."""
        return role_configs(self.config, self.world)

    @cached_property
    def places(self) -> list[Place]:
        """As `places_of`."""
        return places_of(self.config, on_gpu=self.device.name != "cpu")

    @property
    def fullest(self) -> Place:
        return max(self.places, key=lambda place: place.total)

    @property
    def fits(self) -> bool:
        return self.fullest.needed <= self.device.memory

    def record(self) -> dict[str, Any]:
        """The object of `octant plan --json`."""
        roles = {name: {"ranks": [ranks.start, ranks.stop], "parameters": count_parameters(own.model).total,
                        "layout": {axis: getattr(own.parallel, axis) for axis in ("tensor", "pipeline", "context")}
                        | {"data": own.parallel.data_size, "zero": own.parallel.zero}}
                 for name, (ranks, own) in self.roles.items()}
        memory = [{"ranks": [place.ranks.start, place.ranks.stop], "roles": [part.role for part in place.parts],
                   "parameters": sum(part.state.parameters for part in place.staying),
                   "gradients": sum(part.state.gradients for part in place.staying),
                   "optimizer": sum(part.state.optimizer for part in place.staying),
                   "turn": round(place.turn(place.longest)), "turn_of": place.longest.role,
                   "total": round(place.total), "host": place.on_host}
                  for place in self.places]
        return {"world": self.world, "gpu": self.device.name, "roles": roles, "memory": memory, "fits": self.fits,
                "needed_bytes": round(self.fullest.needed), "device_bytes": round(self.device.memory)}


def places_of(config: Config, on_gpu: bool) -> list[Place]:
    """All ranks of the resolved `config`, those beside each other with the same on them together."""
    world = world_size_of(config)
    roles, resting = role_configs(config, world), offloaded(config)

    def part(name: str, own: Config, stage: int) -> Part:
        if name in TRAINED:
            memory = stage_memory(own, stage, on_gpu=on_gpu)
            return Part(name, stage, memory.state, memory.activations + memory.workspace, name in resting)
        state = StateBytes(stage_state(_whole(own), stage).bytes.parameters, 0, 0)
        turn = texts_in_the_making(config, own, stage) if name == ROLLOUT else _forward_pass(own, on_gpu)
        return Part(name, stage, state, turn, name in resting, name == ROLLOUT and not config.rollout.delta)

    parts = {name: [part(name, own, stage) for stage in range(own.parallel.pipeline)]
             for name, (_, own) in roles.items()}
    topologies = {name: Topology.of(own) for name, (_, own) in roles.items()}

    def on(rank: int) -> tuple[Part, ...]:
        return tuple(parts[name][topologies[name].coordinates(rank - ranks.start)["pipeline"]]
                     for name, (ranks, _) in roles.items() if rank in ranks)

    runs = [(found, [*ranks]) for found, ranks in groupby(range(world), key=on)]
    return [Place(range(ranks[0], ranks[-1] + 1), found) for found, ranks in runs]


def actor_of(config: Config) -> Config:
    """The configuration as if the actor, whose layout may be open, were alone and learned a minibatch a step."""
    parallel = (config.roles.actor.parallel or config.parallel).model_dump(mode="json")
    batch = config.batch.model_dump(by_alias=True) | {"global": config.learning.minibatch}
    return Config.model_validate(config.to_dict() | {
        "run": config.run.model_dump() | {"objective": "pretrain"}, "parallel": parallel, "batch": batch,
        "data": config.data.model_dump() | {"train": (), "valid": ()}})


def _whole(own: Config) -> Config:
    """The same with all weights on each rank, as roles have them that are not trained."""
    return own.model_copy(update={"parallel": own.parallel.model_copy(update={"zero": 0})})


def texts_in_the_making(run: Config, own: Config, stage: int) -> float:
    """Bytes of keys and values of a batch of texts at their longest, and of the numbers a token is drawn from."""
    model, tensor, texts = own.model, own.parallel.tensor, run.rollout.batch
    placement, deal = dealt_layers(own)
    layers = sum(len(deal[chunk]) for chunk, owner in enumerate(placement) if owner == stage)
    each = 2 * max(1, model.num_kv_heads // tensor) * model.head_dim * width_of(own)
    cache = texts * run.data.seq_len * layers * each
    return cache + (2 * texts * model.vocab_size / tensor * FP32 if stage == own.parallel.pipeline - 1 else 0)


def _forward_pass(own: Config, on_gpu: bool) -> float:
    """The most that a pass without gradients holds: one layer's, or the head's."""
    sizes = replace(Sizes.of(own, on_gpu), ahead=False)
    units = (embedding_bytes(sizes), layer_bytes(sizes, "none", split=False), head_bytes(sizes))
    return max(sum(unit.forward.at_peak.values()) for unit in units)


def roles_summary(job: PlannedRoles) -> str:
    """All of it in one screen, without a trailing newline."""
    sections = {f"Who is where, on {job.world:,} × {job.device.name}": _picture(job),
                "A step": _step(job.config),
                "Memory of a rank at the worst moment of a step": _memory(job)}
    return "\n\n".join("\n".join([title, *(f"  {line}".rstrip() for line in lines)])
                       for title, lines in sections.items())


def _picture(job: PlannedRoles) -> Iterator[str]:
    rows = [("role", "ranks", _bar(range(job.world), job.world), "layout", "parameters")]
    for name, (ranks, own) in job.roles.items():
        parallel = own.parallel
        cut = [f"{axis} {degree}" for axis, degree in (
            ("tensor", parallel.tensor), ("pipeline", parallel.pipeline), ("context", parallel.context),
            ("data", parallel.data_size), ("ZeRO", parallel.zero)) if degree > (axis != "ZeRO")]
        rows.append((name, _named(ranks), _bar(ranks, job.world), " × ".join(cut) or "one process",
                     counted(count_parameters(own.model).total)))
    yield from table(rows, right=(4,))


def _bar(ranks: range, world: int) -> str:
    """A row of the picture: the part of all ranks that these are, at least one character."""
    width = min(BAR, world) if world < BAR else BAR
    first, last = ranks.start * width // world, max(ranks.start * width // world + 1, ranks.stop * width // world)
    return "·" * first + "█" * (last - first) + "·" * (width - last)


def _step(config: Config) -> Iterator[str]:
    rollout, learning = config.rollout, config.learning
    updates = config.texts_per_step // learning.minibatch
    yield (f"{rollout.prompts:,} prompts × {config.samples_per_prompt} = {config.texts_per_step:,} texts of at most "
           f"{rollout.max_new_tokens:,} new tokens, {config.data.seq_len:,} with their prompt")
    yield (f"{learning.epochs} epoch{'s' * (learning.epochs > 1)} of {updates:,} update{'s' * (updates > 1)}, "
           f"{learning.minibatch:,} texts each")
    if config.rollout.async_steps:
        yield "texts are made a step ahead, with weights that are a step old when they are learned from"


def _memory(job: PlannedRoles) -> Iterator[str]:
    rows: list[tuple[str, ...]] = [("ranks", "roles and their stages", "weights", "gradients", "optimizer", "in turn",
                                    "whose turn", "together")]
    for place in job.places:
        sums = (sum(getattr(part.state, name) for part in place.staying)
                for name in ("parameters", "gradients", "optimizer"))
        rows.append((_named(place.ranks), ", ".join(part.name for part in place.parts), *map(memory_size, sums),
                     memory_size(place.turn(place.longest)), place.longest.role, memory_size(place.total)))
    yield from table(_shortened(rows), right=(2, 3, 4, 5, 7))
    fullest = job.fullest
    if any(place.on_host for place in job.places):
        most = max(place.on_host for place in job.places)
        yield f"offload: at most {memory_size(most)} of host memory for each rank; what a role holds is in its turn"
    yield (f"{'fits' if job.fits else 'DOES NOT FIT'}: {memory_size(fullest.needed)} on ranks {_named(fullest.ranks)} "
           f"with the allocator's margin and a CUDA context, {memory_size(job.device.memory)} are there")


def _shortened(rows: Sequence[tuple[str, ...]], most: int = 24) -> list[tuple[str, ...]]:
    """The first and the last rows of many."""
    if len(rows) <= most:
        return [*rows]
    return [*rows[:most // 2], ("…", *[""] * (len(rows[0]) - 1)), *rows[-most // 2:]]


def _named(ranks: range) -> str:
    return str(ranks.start) if len(ranks) == 1 else f"{ranks.start} to {ranks.stop - 1}"
