"""From a model and a mesh to this rank's part of it, in one fixed order of verbs.

    deal the layers to chunks        which layers run here                       pipeline/partition
    build those chunks on `meta`     no memory yet; names stay global            model/transformer, model/adapter
    spread the sequence              ring attention                              context/ring
    cut every layer                  slices instead of whole weights             tensor/cut
    recompute                        hooks that forget activations               recompute
    move into buckets                memory; gradients get their place           data/buckets
    lower the schedule               what to do, in which order                  schedules/lowering
    give both to the executor        how                                         pipeline/executor

One process goes the same way: one chunk, no cut, one-stage schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from engine.config import Config
from engine.config.optimizers import OPTIMIZERS
from engine.distributed.mesh import Axis, Mesh
from engine.distributed.pieces import Piece
from engine.kernels.blocks import has_few_scales
from engine.kernels.operation import Place
from engine.kernels.table import Operations, choose
from engine.model.adapter import Adapter, attach_adapters
from engine.model.context import Batch
from engine.model.objective import NEXT_TOKEN, Measure, Objective
from engine.model.parameters import initial_values, new_parameter, spec_of, take_local
from engine.model.transformer import Block, Transformer
from engine.parallel.context.ring import RingAttention
from engine.parallel.data.buckets import Bucket
from engine.parallel.data.build import DEFAULT_BUCKET_ELEMENTS, build_buckets
from engine.parallel.data.flat import FlatParameters
from engine.parallel.data.streaming import ParameterStream
from engine.parallel.gradients import WeightGradQueue
from engine.parallel.pipeline.executor import Executor, forward_only
from engine.parallel.pipeline.p2p import Messenger
from engine.parallel.pipeline.partition import deal_layers, layer_costs
from engine.parallel.recompute import apply_recompute
from engine.parallel.tensor.cut import cut_tensor
from engine.parallel.tensor.head import ParallelHead
from engine.parallel.tensor.layers import ParallelLinear, TensorContext
from engine.precision.fp8 import Fp8Gemms, gemms_of
from engine.precision.gemms import GemmsFactory
from engine.schedules.action import Action
from engine.schedules.lowering import hoist_receives, lower
from engine.schedules.program import Schedule
from engine.schedules.table import build_schedule

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class ParallelModel:
    """This rank's part of the model, ready to run steps.

    Attributes:
        chunks: this rank's chunks by global chunk index.
        buckets: the memory of the parameters that are trained, and their gradients.
        frozen: that of the others.
        tensor: the tensor axis as the layers see it.
        objective: what it is trained to do.
    """

    config: Config
    mesh: Mesh
    chunks: dict[int, Transformer]
    buckets: list[Bucket]
    frozen: list[FlatParameters]
    tensor: TensorContext
    objective: Objective
    schedule: Schedule
    executor: Executor

    @property
    def operations(self) -> Operations:
        """What it computes with."""
        return self.tensor.operations

    def initialise(self, seed: int, frozen: bool = True) -> None:
        """Gives every parameter its share of the global initial values, the same in every layout.

        Without `frozen` only what is trained: the others' are about to be read from somewhere.
        """
        for bucket in self.buckets:
            for entry in bucket.entries:
                bucket.set_master(entry, take_local(entry.spec, initial_values(entry.spec, seed)))
        for flat in self.frozen if frozen else ():
            for entry in flat.entries:
                flat.fill(flat.param_shard, entry, take_local(entry.spec, initial_values(entry.spec, seed)))
        self.publish()

    def forward_backward(self, batches: Sequence[Batch], scale: float | Tensor) -> Tensor | None:
        """One step up to the reduced gradients: afterwards every bucket's `grad_shard` is final.

        Args:
            batches: this data rank's microbatches.
            scale: 1 / the objective's count of the whole global batch.

        Returns:
            The objective's sums [microbatches, sums] of these microbatches on the last stage, None elsewhere.
        """
        sums = self.accumulate(batches, scale)
        self.finish_reduction()
        return sums

    def accumulate(self, batches: Sequence[Batch], scale: float | Tensor) -> Tensor | None:
        """The first part of `forward_backward`: the schedule; reductions may still be under way."""
        for bucket in self.buckets:
            bucket.begin_step(len(batches))
        return self.executor.run(self.program_of(len(batches)), batches, self.objective, scale)

    def program_of(self, num_microbatches: int) -> tuple[Action, ...]:
        """What this stage does in a step of so many microbatches."""
        parallel = self.config.parallel
        return training_program(parallel.schedule, parallel.pipeline, num_microbatches, parallel.virtual_stages,
                                self.mesh.pipeline.index)

    @property
    def program(self) -> tuple[Action, ...]:
        """That of a whole batch."""
        return self.program_of(self.config.num_microbatches)

    def finish_reduction(self) -> None:
        """The second part: waits until every bucket's `grad_shard` is final."""
        for bucket in self.buckets:
            bucket.finish_reduction()

    @property
    def adapter_keys(self) -> set[str]:
        """The keys of adapters among the pieces of the weights; the others are the model's own."""
        adapters = [module for chunk in self.chunks.values() for module in chunk.modules()
                    if isinstance(module, Adapter)]
        return {f"model.{spec_of(parameter).name}" for adapter in adapters for parameter in adapter.parameters()}

    def frozen_pieces(self) -> list[Piece]:
        """This rank's part of the weights that are not trained; the tensors are the live ones."""
        return [piece for flat in self.frozen for piece in flat.pieces("model", flat.param_shard)]

    def shards(self, prefix: str, vectors: Sequence[Tensor]) -> list[Piece]:
        """What vectors laid out like the buckets' shards (masters, moments) hold of each parameter; the live ones."""
        return [piece for bucket, vector in zip(self.buckets, vectors, strict=True)
                for piece in bucket.pieces(prefix, vector)]

    def weights(self, now: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> list[Piece]:
        """This rank's part of the weights that the layers use; the tensors are the live ones, padding left out.

        Where the parameters are there around their use only (ZeRO 3), it is this rank's shard of them.

        Args:
            now: where a parameter's or a shard's values are.
        """
        if any(flat.level >= 3 for flat in (*self.buckets, *self.frozen)):
            held = [now(bucket.param_shard).to(bucket.param_buffer.dtype) for bucket in self.buckets]
            return [*self.shards("model", held), *self.frozen_pieces()]
        once = dict.fromkeys(parameter for chunk in self.chunks.values() for parameter in chunk.parameters())
        return [Piece(f"model.{spec.name}", spec.shape, box, now(parameter.detach())[place.slices])
                for parameter, spec in ((parameter, spec_of(parameter)) for parameter in once)
                for box, place in spec.held]

    def publish(self) -> None:
        """Makes the masters, all shards of them, the weights that the layers use."""
        for work in [bucket.start_publish() for bucket in self.buckets]:
            work.wait()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], measure: Measure | None = None) -> Tensor | None:
        """The objective's sums without gradients, as `forward_backward` returns them; or what `measure` makes.

        That may be anything of one shape for all microbatches, such as a log-probability per token; see `Executor.run`.
        """
        parallel = self.config.parallel
        program = forward_program(parallel.schedule, parallel.pipeline, len(batches), parallel.virtual_stages,
                                  self.mesh.pipeline.index)
        return self.executor.run(program, batches, measure or self.objective, 1.0)


@cache
def training_program(schedule: str, stages: int, microbatches: int, chunks: int, stage: int) -> tuple[Action, ...]:
    """What a stage does in a step; lowering takes long enough not to be done in every step."""
    return hoist_receives(lower(build_schedule(schedule, stages, microbatches, chunks)).programs[stage])


@cache
def forward_program(schedule: str, stages: int, microbatches: int, chunks: int, stage: int) -> tuple[Action, ...]:
    """What a stage does in an evaluation; lowering takes long enough not to be done for every batch."""
    programs = lower(build_schedule(schedule, stages, microbatches, chunks)).programs
    return hoist_receives(forward_only(programs[stage]))


def parallelize(config: Config, mesh: Mesh, *, training: bool = True, objective: Objective = NEXT_TOKEN,
                operations: Operations | None = None, gemms: GemmsFactory | None = None,
                bucket_elements: int = DEFAULT_BUCKET_ELEMENTS) -> ParallelModel:
    """This rank's part of `config.model` under `config.parallel` (resolved); parameters are not initialised yet.

    Without `training` it can evaluate and generate only: there are weights in the compute dtype and nothing else, no
    buckets, and no sequence parallelism, so that any number of tokens can pass.

    Args:
        operations: what to compute with; None: what `config.kernels` asks for and this rank's device has.
        gemms: makes every linear layer's products; None: those that `config.precision` asks for.
        bucket_elements: size from which a bucket is closed.

    Raises:
        ConfigError: an operation that `config.kernels` names, or FP8, cannot be used here.
    """
    parallel = config.parallel
    dtype = DTYPES[config.precision.compute]
    sequence = training and parallel.sequence and mesh.tensor.size > 1
    if operations is None:
        operations = choose_operations(config, mesh.device)
    tensor = TensorContext(mesh.tensor, sequence, WeightGradQueue(), operations,
                           gemms or gemms_of(config, mesh, sequence, operations), config.optim.embedding_grad)
    schedule = build_schedule(parallel.schedule, parallel.pipeline, config.num_microbatches, parallel.virtual_stages)
    chunks = build_chunks(config, schedule.placement, mesh.pipeline.index, operations)
    for chunk in chunks.values():
        if config.adapter is not None and training:
            attach_adapters(chunk, config.adapter)
        if mesh.context.size > 1:
            spread_sequence(chunk, mesh.context, operations)
        cut_tensor(chunk, tensor)
    share_tied_weight(chunks)
    if training:
        apply_recompute(recomputed_blocks(config, chunks, mesh.pipeline.index), parallel.recompute)
    buckets: list[Bucket] = []
    frozen: list[FlatParameters] = []
    if training:
        buckets, frozen = build_buckets(list(reversed(chunks.values())), mesh, level=parallel.zero, dtype=dtype,
                                        reduce_dtype=DTYPES[config.precision.grad_reduce],
                                        reproducible=parallel.reproducible,
                                        matrices_apart=OPTIMIZERS[config.optim.name].of_matrices is not None,
                                        bucket_elements=bucket_elements,
                                        narrow=gathered_casts(config, chunks, mesh.pipeline.index),
                                        rounding=config.run.seed if config.precision.masters == "off" else None)
    else:
        allocate_weights(chunks.values(), dtype, mesh.device)
    if training and parallel.zero == 3:
        ParameterStream(chunks.values(), [*buckets, *frozen])
    messenger = Messenger(mesh.pipeline, len(schedule.placement), mesh.tensor.size if sequence else 1,
                          config.model.hidden_size, dtype, mesh.device)
    last = chunks.get(len(schedule.placement) - 1)
    head = None if last is None else ParallelHead(last, tensor, mesh.context, ahead=not parallel.reproducible)
    executor = Executor(chunks, schedule.placement, messenger, tensor.weight_grads, head)
    return ParallelModel(config, mesh, chunks, buckets, frozen, tensor, objective, schedule, executor)


def choose_operations(config: Config, device: torch.device) -> Operations:
    """What `config.kernels` asks for, on this device.

    Raises:
        ConfigError: it does not exist, or cannot be used there.
    """
    place = Place(device, DTYPES[config.precision.compute], config.parallel.reproducible, config.precision.fp8)
    return choose(place, config.kernels.model_dump())


def build_chunks(config: Config, placement: Sequence[int], stage: int,
                 operations: Operations) -> dict[int, Transformer]:
    """The chunks of one pipeline stage, uncut, on the meta device."""
    layer, embedding, output = layer_costs(config.model, config.data.seq_len)
    deal = deal_layers(config.model.num_layers, len(placement), layer=layer, embedding=embedding, output=output)
    with torch.device("meta"):
        return {chunk: Transformer(config.model, deal[chunk], first=chunk == 0, last=chunk == len(placement) - 1,
                                   operations=operations)
                for chunk, owner in enumerate(placement) if owner == stage}


def spread_sequence(chunk: Transformer, axis: Axis, operations: Operations) -> None:
    """Attention that reaches beyond this rank's part of the sequence."""
    for block in chunk.layers.values():
        if isinstance(block, Block):
            block.self_attention.core_attention = RingAttention(axis, operations.attention_block)


def recomputed_blocks(config: Config, chunks: dict[int, Transformer], stage: int) -> list[Block]:
    """The layers of this stage that recompute: all, or the first so many."""
    blocks = [block for chunk in chunks.values() for block in chunk.layers.values() if isinstance(block, Block)]
    limit = config.parallel.recompute_layers
    return blocks[: limit[stage] if isinstance(limit, tuple) else limit]


def gathered_casts(config: Config, chunks: dict[int, Transformer], stage: int) -> dict[nn.Parameter, Fp8Gemms]:
    """ZeRO 3: the weights whose casts are gathered in place of them, with the products that take these."""
    if config.parallel.zero < 3:
        return {}
    again = recomputed_blocks(config, chunks, stage) if config.parallel.recompute == "full" else []
    found = {}
    for block in (block for chunk in chunks.values() for block in chunk.layers.values()):
        for layer in block.modules():
            if isinstance(layer, ParallelLinear) and isinstance(layer.gemms, Fp8Gemms) \
                    and spec_of(layer.weight).trainable and has_few_scales(layer.gemms.recipe.weight_block):
                layer.gemms.recomputed = block in again
                found[layer.weight] = layer.gemms
    return found


def allocate_weights(chunks: Iterable[Transformer], dtype: torch.dtype, device: torch.device) -> None:
    """Memory for the parameters (on the meta device until here) and for nothing else; they take no gradients."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            if parameter.is_meta:
                weight = new_parameter(spec_of(parameter), device, dtype).requires_grad_(False)
                torch.utils.swap_tensors(parameter, weight)


def share_tied_weight(chunks: dict[int, Transformer]) -> None:
    """Where embedding and output layer are tied and both here, but in different chunks, they share one parameter."""
    first = next((c.embedding for c in chunks.values() if c.embedding is not None), None)
    output = next((c.output_layer for c in chunks.values() if c.output_layer is not None), None)
    if first is not None and output is not None and spec_of(output.weight).tied_copy:
        output.weight = first.weight
