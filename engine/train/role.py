"""Roles: the models of a run, each on its ranks and in its layout.

Pretraining has one role; PPO has an actor, a critic, a reference and a reward model.  A role is a value: what the model
is, how it is cut, where it lives, whether it is trained, and for what.  What a rank holds of one is a `RoleState`.

Every rank runs the same program over all roles.  A role's verbs do nothing where it does not live and return None
there, so roles on the same ranks work one after the other, and roles on disjoint ranks at the same time, without either
being written down:

    states = {role.name: RoleState.build(role, config, job) for role in roles}       # the same order everywhere
    for state in states.values():
        sums = state.forward_backward(batches[state.role.name], scale)
        …

A role that is not trained has weights and nothing else: no masters, no gradients, no moments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor

from engine.config import Config, ModelConfig, OptimConfig, ParallelConfig, resolve_layout
from engine.distributed.mesh import Job, Mesh
from engine.distributed.pieces import Piece
from engine.distributed.topology import Topology
from engine.model.context import Batch
from engine.model.objective import NEXT_TOKEN, Measure, Objective
from engine.model.parameters import initialise
from engine.optim.gradients import StepSums, clip_divisor, sum_over_world, unusable
from engine.optim.optimizer import Optimizer, make_optimizer
from engine.parallel.data.offload import Offload
from engine.parallel.parallelize import ParallelModel, parallelize


@dataclass(frozen=True)
class Role:
    """One model of a run.

    Attributes:
        ranks: where it lives; `parallel` makes a layout of as many processes.
        trainable: it has an optimizer; else its weights change only when somebody writes them.
        optim: its own optimizer settings; None: the run's.
        offload: its memory is the host's while it has nothing to do (`RoleState.at_work`).
        refilled: all its weights are written anew before each use, so that idle it needs no memory at all.
    """

    name: str
    model: ModelConfig
    parallel: ParallelConfig
    ranks: range
    trainable: bool = True
    objective: Objective = NEXT_TOKEN
    optim: OptimConfig | None = None
    offload: bool = False
    refilled: bool = False

    @staticmethod
    def of(config: Config, objective: Objective = NEXT_TOKEN) -> Role:
        """The only role of a run that trains one model on all its ranks."""
        return Role("model", config.model, config.parallel, range(config.parallel.world_size), objective=objective)

    def config(self, run: Config) -> Config:
        """The run's configuration as this role sees it.

        Raises:
            ConfigError: its layout is impossible on its ranks.
        """
        own = {"model": self.model, "parallel": self.parallel, "optim": self.optim or run.optim}
        values = {name: section.model_dump(mode="json", by_alias=True) for name, section in own.items()}
        return resolve_layout(Config.model_validate(run.to_dict() | values), len(self.ranks))


@dataclass
class RoleState:
    """What this rank holds of a role; where the role does not live, nothing.

    Attributes:
        optimizer: None also where the role is not trained.
        parked: its weights, and the masters and moments of what is trained, where they may be in host memory.
    """

    role: Role
    mesh: Mesh | None = None
    model: ParallelModel | None = None
    optimizer: Optimizer | None = None
    parked: tuple[Offload, ...] = ()

    @staticmethod
    def build(role: Role, run: Config, job: Job) -> RoleState:
        """Every rank of the job must call this, for all roles in one order: it creates the role's groups.

        Raises:
            ConfigError: its layout is impossible on its ranks, or an operation that it names cannot be used here.
            RequestError: the job does not have these ranks.
        """
        config = role.config(run)
        mesh = job.mesh_on(role.ranks, Topology.of(config))
        return RoleState(role) if mesh is None else RoleState.on(mesh, role, config)

    @staticmethod
    def on(mesh: Mesh, role: Role, config: Config) -> RoleState:
        """A role that lives on this rank; `config` is its own."""
        model = parallelize(config, mesh, training=role.trainable, objective=role.objective)
        optimizer = make_optimizer(model.buckets, config.optim, model.operations) if role.trainable else None
        state = RoleState(role, mesh, model, optimizer)
        if role.offload:
            state.parked = _offloads(role, model, optimizer)
            for part in state.parked:
                part.rest()
        return state

    @contextmanager
    def at_work(self, learning: bool = False) -> Iterator[None]:
        """Inside, its weights are on the device, and what it learns with too if it is `learning`; in nothing else do
        they change."""
        with ExitStack() as stack:
            for part in self.parked if learning else self.parked[:1]:
                stack.enter_context(part.at_work(writes=learning))
            yield
            for bucket in self.model.buckets if self.model is not None and self.parked else ():
                if bucket.level >= 3:
                    bucket.release()

    def initialise(self, seed: int) -> None:
        """Gives every parameter its share of the global initial values, the same in every layout."""
        if self.model is None:
            return
        if self.role.trainable:
            self.model.initialise(seed)
        for chunk in self.model.chunks.values() if not self.role.trainable else ():
            initialise(chunk, seed)

    def forward_backward(self, batches: Sequence[Batch], scale: float | Tensor) -> Tensor | None:
        """As `ParallelModel.forward_backward`."""
        return None if self.model is None else self.model.forward_backward(batches, scale)

    def evaluate(self, batches: Sequence[Batch], measure: Measure | None = None) -> Tensor | None:
        """As `ParallelModel.evaluate`."""
        return None if self.model is None else self.model.evaluate(batches, measure)

    def totals(self, sums: Tensor | None, *, with_gradients: bool = True, flag: bool = False) -> StepSums | None:
        """Sums and gradient norm over all of the role's ranks (`sum_over_world`), the same on each of them."""
        if self.model is None:
            return None
        return sum_over_world(sums, self.model.buckets if with_gradients else [], self.model.mesh,
                              num_sums=len(self.role.objective.sums), flag=flag,
                              reproducible=self.model.config.parallel.reproducible)

    def update(self, lr: float, totals: StepSums | None, counts: Tensor | None = None) -> None:
        """Clips by the norm in `totals` and updates the masters; a step whose norm is `unusable` changes nothing.

        Args:
            counts: the objective's count of the global batch; where it is 0, the step changes nothing either.
        """
        if self.model is not None and self.optimizer is not None and totals is not None:
            skipped = unusable(totals.grad_norm, self.model.config.reliability.max_grad_norm)
            skipped = skipped if counts is None else skipped | (counts == 0)
            self.optimizer.step(lr, clip_divisor(totals.grad_norm, self.model.config.optim.grad_clip), skipped.float())

    def publish(self) -> None:
        """Makes the masters the weights that the layers use."""
        if self.model is not None and self.role.trainable:
            with self.at_work(learning=True):
                self.model.publish()

    def weights(self) -> list[Piece]:
        """This rank's part of the weights that the layers use, in the compute dtype, in whichever memory
        they are now; the tensors are the live ones."""
        return [] if self.model is None else self.model.weights(self._now)

    def masters(self, prefix: str = "") -> list[Piece]:
        """This rank's part of the fp32 weights of a role that is trained, in whichever memory they are now."""
        return [] if self.model is None else self.model.shards(
            f"{prefix}model", [self._now(bucket.master) for bucket in self.model.buckets])

    def moments(self, prefix: str = "") -> list[Piece]:
        """This rank's part of the optimizer's moments, in whichever memory they are now."""
        return [] if self.optimizer is None else self.optimizer.pieces(f"{prefix}optimizer", self._now)

    def _now(self, vector: Tensor) -> Tensor:
        for part in self.parked:
            vector = part.now(vector)
        return vector


def _offloads(role: Role, model: ParallelModel, optimizer: Optimizer | None) -> tuple[Offload, ...]:
    """The weights, and what is needed for learning besides; gradients come and go with that, and nobody keeps them."""
    weights: list[Tensor] = [tensor for bucket in model.buckets for tensor in bucket.held()]
    if not role.trainable:
        weights = [parameter for chunk in model.chunks.values() for parameter in chunk.parameters()]
        return (Offload((), weights) if role.refilled else Offload(weights),)
    moments = [] if optimizer is None else optimizer.state()
    masters = [bucket.master for bucket in model.buckets if bucket.has_own_master]
    gradients = [tensor for bucket in model.buckets for tensor in bucket.gradients()]
    return Offload(weights), Offload([*masters, *moments], gradients)
