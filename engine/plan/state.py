"""What a rank holds all the time, in bytes: the flat buckets of `engine.parallel.data`, laid out without tensors.

The parameters are the model's specs (`engine.model.inventory`), dealt to chunks and cut over the tensor axis as
`parallelize` does; what a bucket takes in, and how it is padded, follows `engine.parallel.data.build`.  It is
arithmetic, so it costs nothing for a job of any size, and a test holds it to the storages that a rank builds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import NamedTuple

from engine.config import AdapterConfig, Config, ModelConfig
from engine.config.optimizers import OPTIMIZERS, Row
from engine.kernels.blocks import WEIGHT_BLOCKS, cast_bytes, has_few_scales, num_scales, ways
from engine.model.inventory import Specs, end_specs, layer_specs
from engine.model.projections import all_adapter_specs, fused_in, is_projection
from engine.model.spec import ParamSpec
from engine.parallel.pipeline.partition import deal_layers, layer_costs
from engine.schedules.table import build_placement

ALIGNMENT = 64                             # elements; of engine.parallel.data.buckets
BUCKET_ELEMENTS = 40_000_000               # of engine.parallel.data.build
FP32 = 4
SCORE = "score.weight"                     # a head that is trained beside adapters


@dataclass(frozen=True)
class StateBytes:
    """Memory that is taken all the time, padding included; what comes and goes within a step is not in it.

    Attributes:
        parameters: in the compute dtype.
        gradients: fp32.
        optimizer: moments, and the fp32 masters unless they are the parameters themselves.
        casts: of weights, in FP8.
    """

    parameters: int
    gradients: int
    optimizer: int
    casts: int = 0

    @property
    def weights(self) -> int:
        """What the layers compute with."""
        return self.parameters + self.casts

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.casts


@dataclass(frozen=True)
class Unit:
    """Embedding, a layer, or final norm and head: what one forward pass uses together.

    Attributes:
        what: `embedding`, `layer` or `head`.
        chunk: global index.
        specs: its parameters, cut for a tensor rank.
        fp8: its products multiply FP8 matrices.
    """

    what: str
    chunk: int
    specs: tuple[ParamSpec, ...]
    fp8: bool = False

    @property
    def cast(self) -> list[ParamSpec]:
        """What is cast of it."""
        return [spec for spec in self.specs if self.fp8 and is_projection(spec.name)]

    def gathered_bytes(self, config: Config, *, backward: bool) -> int:
        """ZeRO 3: its weights, as they are gathered for a pass; what is recomputed needs both ways to cast a weight."""
        narrow = sum(map(_elements, self.cast)) if gathers_casts(config) else 0
        both = backward and narrow and config.parallel.recompute == "full"
        times = len(ways(WEIGHT_BLOCKS[config.precision.fp8])) if both else 1
        return narrow * times + (sum(map(_elements, self.specs)) - narrow) * width_of(config)


@dataclass(frozen=True)
class StageState:
    """A pipeline stage of a resolved configuration.

    Attributes:
        units: of its chunks, in forward order, chunk by chunk.
        buckets: elements of each, padding included, in the order in which a backward pass fills them.
        frozen: elements of what is not trained, under adapters.
        matrices: elements of the buckets that hold matrices alone, of which the optimizer keeps something else.
        factored: rows and columns of matrices, where it keeps a number of each.
        narrow: elements of the buckets of which casts are kept and gathered.
    """

    config: Config
    units: tuple[Unit, ...]
    buckets: tuple[int, ...]
    frozen: int = 0
    matrices: int = 0
    factored: int = 0
    narrow: int = 0

    @property
    def bytes(self) -> StateBytes:
        """As `engine.plan.explain` reads them off what is built."""
        parallel, width = self.config.parallel, width_of(self.config)
        total = sum(self.buckets)
        shard = total // shards_of(self.config)
        whole = shard if parallel.zero >= 3 else total
        gradients = shard if parallel.zero >= 2 else total + (shard if parallel.reproducible else 0)
        frozen = self.frozen // (shards_of(self.config) if parallel.zero >= 3 else 1)
        row, matrices = OPTIMIZERS[self.config.optim.name], self.matrices // shards_of(self.config)
        moments = shard * row.moments - matrices * (row.moments - (row.of_matrices or 0)) + self.factored
        moments += shard if row.averages and self.config.optim.momentum else 0
        narrow = self.narrow // shards_of(self.config)
        off = self.config.precision.masters == "off"
        masters = narrow * width if off or width == FP32 else shard * FP32
        return StateBytes((whole + frozen - narrow) * width, gradients * FP32, moments * FP32 + masters,
                          self._casts(narrow))

    def _casts(self, narrow: int) -> int:
        """Of a shard where they are gathered, else of all that a layer keeps; nothing where it casts at each use."""
        block = WEIGHT_BLOCKS.get(self.config.precision.fp8, (1, 1))
        weights = [(_elements(spec) // spec.local_shape[-1], spec.local_shape[-1])
                   for unit in self.units for spec in unit.cast]
        if self.config.parallel.zero < 3:
            return sum(cast_bytes(block, *shape) for shape in weights)
        return narrow * len(ways(block)) + sum(FP32 * num_scales(block, *shape) for shape in weights) if narrow else 0


def gathers_casts(config: Config) -> bool:
    """Whether casts of weights are gathered in place of weights (`engine.parallel.data.narrow`)."""
    block = WEIGHT_BLOCKS.get(config.precision.fp8)
    return config.parallel.zero == 3 and config.adapter is None and block is not None and has_few_scales(block)


def _elements(spec: ParamSpec) -> int:
    return prod(spec.local_shape)


def width_of(config: Config) -> int:
    """Bytes of an element in the compute dtype."""
    return FP32 if config.precision.compute == "fp32" else 2


def shards_of(config: Config) -> int:
    """Ranks that share one copy of the optimizer's state."""
    parallel = config.parallel
    return (parallel.zero_shard or parallel.data_size * parallel.context) if parallel.zero else 1


def dealt_layers(config: Config, even: bool = False) -> tuple[tuple[int, ...], tuple[range, ...]]:
    """Chunk → stage, and chunk → layers; `even`: as many to each, whatever else it does (Megatron-LM)."""
    parallel = config.parallel
    placement = build_placement(parallel.schedule, parallel.pipeline, parallel.virtual_stages)
    return placement, _deal(config.model, config.data.seq_len, len(placement), even)


@lru_cache(maxsize=256)
def _deal(model: ModelConfig, seq_len: int, num_chunks: int, even: bool) -> tuple[range, ...]:
    layer, embedding, output = (1.0, 0.0, 0.0) if even else layer_costs(model, seq_len)
    return tuple(deal_layers(model.num_layers, num_chunks, layer=layer, embedding=embedding, output=output))


def stage_state(config: Config, stage: int, *, even: bool = False) -> StageState:
    """What stage `stage` holds, on its first tensor rank (the others differ in padding only)."""
    placement, deal = dealt_layers(config, even)
    chunks = [chunk for chunk, owner in enumerate(placement) if owner == stage]
    by_chunk = {chunk: tuple(_units(config, chunk, len(placement), deal[chunk])) for chunk in chunks}
    sizes: list[int] = []
    frozen = matrices = factored = narrow = 0
    row = OPTIMIZERS[config.optim.name]
    both = {0, len(placement) - 1} <= set(chunks)
    for chunk in reversed(chunks):
        portions = [(_own(unit, both), unit.fp8 and gathers_casts(config)) for unit in by_chunk[chunk]]
        if config.parallel.zero < 3:
            portions = [([spec for portion, _ in portions for spec in portion], False)]
        for portion, casts in reversed(portions):
            for size, kind in _bucket_sizes((spec for spec in reversed(portion) if spec.trainable),
                                            shards_of(config), row, casts):
                sizes.append(size)
                matrices += size if kind.matrix else 0
                narrow += size if kind.narrow else 0
            factored += sum(map(rows_and_columns, portion)) if row.factored else 0
            rest = sum(_up(prod(spec.local_shape), ALIGNMENT) for spec in portion if not spec.trainable)
            frozen += _up(rest, ALIGNMENT * (shards_of(config) if config.parallel.zero == 3 else 1))
    return StageState(config, tuple(unit for units in by_chunk.values() for unit in units), tuple(sizes), frozen,
                      matrices, factored, narrow)


def _units(config: Config, chunk: int, num_chunks: int, layers: Sequence[int]) -> Iterator[Unit]:
    """The chunk's units in forward order, their parameters cut for a tensor rank."""
    specs = cut_specs(config.model, config.adapter, config.parallel.tensor, config.parallel.sequence)
    if chunk == 0:
        yield Unit("embedding", chunk, specs["embedding"])
    fp8 = config.precision.fp8_layers(config.model.num_layers)
    yield from (Unit("layer", chunk, specs["layer"], layer in fp8) for layer in layers)
    if chunk == num_chunks - 1:
        yield Unit("head", chunk, specs["head"])


@lru_cache(maxsize=64)
def cut_specs(model: ModelConfig, adapter: AdapterConfig | None, tensor: int,
              sequence: bool) -> dict[str, tuple[ParamSpec, ...]]:
    """The parameters of each kind of unit on a tensor rank, with those of adapters."""
    def cut(specs: Specs) -> tuple[ParamSpec, ...]:
        own = list(specs.values())
        if adapter is not None:
            own = [replace(spec, trainable=name == SCORE) for name, spec in specs.items()]
            own += all_adapter_specs(specs, adapter)
        return tuple(spec.on_tensor_rank(tensor, 0, sequence) for spec in own)

    ends = dict(end_specs(model))
    embedding = {name: ends.pop(name) for name in (*ends,) if "embedding" in name}
    return {"embedding": cut(embedding), "layer": cut(layer_specs(model, 0)), "head": cut(ends)}


def _own(unit: Unit, both: bool) -> list[ParamSpec]:
    """The unit's parameters for a bucket.  Where `both` ends of a tied embedding are here, the head, whose backward
    pass comes first, brings it along, and no other rank holds a copy."""
    if not both or not any(spec.tied for spec in unit.specs):
        return list(unit.specs)
    return [] if unit.what == "embedding" else [replace(spec, tied=False) for spec in unit.specs]


def rows_and_columns(spec: ParamSpec) -> int:
    """Of a matrix that is trained, on a tensor rank; columns of each of those that it holds."""
    if not (spec.decay and spec.trainable):
        return 0
    *outside, width = spec.local_shape
    fused = fused_in(spec.name)
    return prod(outside) + width * len([*fused.rows(outside[fused.dim])])


class _Kind(NamedTuple):
    """Of a bucket: what `engine.parallel.data.buckets.BucketKind` tells apart on a rank."""

    matrix: bool
    narrow: bool
    decay: bool
    partial_sum: bool
    copied: bool
    tied: bool


def _bucket_sizes(specs: Iterable[ParamSpec], num_shards: int, row: Row, casts: bool) -> Iterator[tuple[int, _Kind]]:
    """Elements and kinds of the buckets that take in these parameters, given in backward order.

    `casts`: of projections, casts are gathered.
    """
    filling: dict[_Kind, tuple[int, int]] = {}                          # elements so far, and with alignment
    for spec in specs:
        matrix = spec.decay if row.factored else row.of_matrices is not None and is_projection(spec.name)
        kind = _Kind(matrix, casts and is_projection(spec.name), spec.decay, spec.partial_sum, spec.copies > 1,
                     spec.tied)
        size = _elements(spec)
        elements, aligned = filling.get(kind, (0, 0))
        if elements and elements + size > BUCKET_ELEMENTS:
            yield _up(aligned, num_shards * ALIGNMENT), kind
            elements = aligned = 0
        filling[kind] = elements + size, aligned + _up(size, ALIGNMENT)
    yield from ((_up(aligned, num_shards * ALIGNMENT), kind) for kind, (_, aligned) in filling.items())


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
