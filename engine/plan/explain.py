"""What one rank of a job holds, whom it talks to and what it does, without running the job.

There is no second description of a layout that could be wrong: this is `parallelize` itself, on the meta device, where
tensors have shapes and no memory, with a mesh that has ranks and no groups.  So it takes milliseconds for any rank of
any job, and what is read off here is what the rank will build: its buckets, their shards, their boxes, its program.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from engine.config import Config
from engine.distributed.boxes import Box
from engine.distributed.mesh import Mesh, meta_mesh
from engine.distributed.topology import Topology
from engine.errors import RequestError
from engine.kernels.table import PORTABLE
from engine.model.parameters import spec_of
from engine.optim.optimizer import Optimizer, make_optimizer
from engine.parallel.data.buckets import Bucket
from engine.parallel.data.flat import FlatParameters
from engine.parallel.parallelize import ParallelModel, parallelize
from engine.parallel.tensor.layers import ParallelLinear
from engine.plan.state import StateBytes
from engine.precision.fp8 import Fp8Gemms
from engine.schedules.program import Program


@dataclass(frozen=True)
class Part:
    """What a rank holds of one parameter.

    Attributes:
        name: global name.
        shape: global shape.
        slice: what the rank computes with.
        state: what it updates: the boxes of its share of the fp32 masters and moments.
    """

    name: str
    shape: tuple[int, ...]
    slice: Box
    state: tuple[Box, ...]


@dataclass(frozen=True)
class Explanation:
    """A rank of the job of `config`.

    Attributes:
        coordinates: its index along every axis.
        axes: the ranks it works with, by the names of `engine.distributed.mesh`.
        layers: by chunk, the layers it runs.
        placement: chunk → pipeline stage, of the whole pipeline.
        parts: its parameters, in model order.
        elements: parameters that it computes with, a tied one once.
        num_buckets: flat vectors they lie in; each is reduced and gathered as one.
        program: its actions of one step, in order.
    """

    config: Config
    rank: int
    coordinates: dict[str, int]
    axes: dict[str, tuple[int, ...]]
    layers: dict[int, tuple[int, ...]]
    placement: tuple[int, ...]
    parts: tuple[Part, ...]
    elements: int
    num_buckets: int
    bytes: StateBytes
    program: Program


def explain(config: Config, rank: int) -> Explanation:
    """Rank `rank` of the job of `config`, which is resolved (`resolve_layout`).

    Raises:
        RequestError: the job has no such rank.
    """
    topology = Topology.of(config)
    if not 0 <= rank < topology.world_size:
        raise RequestError(f"there is no rank {rank}: the job has {topology.world_size:,} processes, ranks 0 to "
                           f"{topology.world_size - 1}")
    mesh = meta_mesh(topology, rank)
    return describe(parallelize(config, mesh, operations=PORTABLE), mesh)


def describe(model: ParallelModel, mesh: Mesh) -> Explanation:
    """What `parallelize` has built on this mesh, on whatever device."""
    state: dict[str, list[Box]] = {}
    for bucket in model.buckets:
        for spec, box, _ in bucket.boxes(bucket.master):
            state.setdefault(spec.name, []).append(box)
    once = dict.fromkeys(parameter for chunk in model.chunks.values() for parameter in chunk.parameters())
    specs = [spec_of(parameter) for parameter in once]
    return Explanation(
        model.config, mesh.rank, mesh.topology.coordinates(mesh.rank), mesh.topology.axes_of(mesh.rank),
        {chunk: tuple(map(int, module.layers)) for chunk, module in model.chunks.items()}, model.schedule.placement,
        tuple(Part(spec.name, spec.shape, box, tuple(state.get(spec.name, ())))
              for spec in specs for box, _ in spec.held),
        sum(box.num_elements for spec in specs for box, _ in spec.held), len(model.buckets),
        state_bytes(model.buckets, make_optimizer(model.buckets, model.config.optim, model.operations), model.frozen,
                    _kept_casts(model)),
        model.program)


def state_bytes(buckets: Iterable[Bucket], optimizer: Optimizer, frozen: Iterable[FlatParameters] = (),
                casts: int = 0) -> StateBytes:
    """Sizes of the storages behind buckets and moments; of views of one storage only one is counted.

    `casts`: bytes of those that layers keep for themselves.
    """
    parameters = [tensor for flat in frozen for tensor in flat.held()]
    gradients, masters, narrow = list[Tensor](), list[Tensor](), list[Tensor]()
    for bucket in buckets:
        (narrow if bucket.kind.narrow else parameters).extend(bucket.held())
        gradients += [bucket.grad_buffer] + ([bucket.grad_shard] if bucket.per_microbatch else [])
        masters += [bucket.master] if bucket.has_own_master else []
    return StateBytes(_storage(parameters), _storage(gradients), _storage([*masters, *optimizer.state()]),
                      _storage(narrow) + casts)


def _kept_casts(model: ParallelModel) -> int:
    return sum(layer.gemms.kept_bytes(layer.weight) for chunk in model.chunks.values() for layer in chunk.modules()
               if isinstance(layer, ParallelLinear) and isinstance(layer.gemms, Fp8Gemms))


def _storage(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.untyped_storage().size() for tensor in tensors)
