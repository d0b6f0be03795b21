"""Which parameters share a bucket.

Up to ZeRO 2 a bucket is filled in backward order until it is large enough for its reduction to use the network well.
With ZeRO 3 a bucket is gathered as a whole around the use of its parameters, so it never reaches beyond a *unit*: the
embedding, one layer, or final norm and head.  Buckets never mix chunks or kinds.

What is not trained is laid out the same way, without gradients, masters and moments; nothing is updated, so it is whole
on every rank up to ZeRO 2.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import torch
from torch import nn

from engine.distributed.mesh import Mesh
from engine.model.parameters import spec_of
from engine.model.transformer import Transformer
from engine.parallel.data.buckets import Bucket, BucketKind, kind_of
from engine.parallel.data.flat import FlatParameters
from engine.parallel.data.narrow import NarrowBucket
from engine.precision.fp8 import Fp8Gemms

DEFAULT_BUCKET_ELEMENTS = 40_000_000

NOTHING: Mapping[nn.Parameter, Fp8Gemms] = MappingProxyType({})

Group = list[tuple[nn.Parameter, int]]      # parameters, each with its number of uses


def units_of(chunk: Transformer) -> list[list[nn.Module]]:
    """The chunk's modules in forward order, in the portions in which ZeRO 3 gathers them."""
    units: list[list[nn.Module]] = [[layer] for layer in chunk.layers.values()]
    if chunk.embedding is not None:
        units.insert(0, [chunk.embedding, *filter(None, [chunk.position_embedding, chunk.embedding_layernorm])])
    head = chunk.output_layer or chunk.score
    if chunk.final_layernorm is not None and head is not None:
        units.append([chunk.final_layernorm, head])
    return units


def build_buckets(chunks: Sequence[Transformer], mesh: Mesh, *, level: int, dtype: torch.dtype,
                  reduce_dtype: torch.dtype, reproducible: bool = False,
                  bucket_elements: int = DEFAULT_BUCKET_ELEMENTS,
                  matrices_apart: bool = False, narrow: Mapping[nn.Parameter, Fp8Gemms] = NOTHING,
                  rounding: int | None = None,
                  ) -> tuple[list[Bucket], list[FlatParameters]]:
    """Moves the parameters of this rank's chunks (cut; still on the meta device) into buckets.

    Args:
        chunks: in the order in which the backward pass finishes them.
        mesh: this rank's place.
        level: of ZeRO, 0 to 3.
        dtype: of the parameters.
        reduce_dtype: in which gradients travel; they are summed up in fp32.
        reproducible: sum them up in the order of the global batch.
        bucket_elements: size from which a bucket is closed, up to level 2.
        matrices_apart: no bucket holds projections of the layers and anything else.
        narrow: weights of which casts are gathered, with the products that use these.
        rounding: no masters are kept, and new weights are rounded by chance, by a stream of this seed.

    Returns:
        Those of what is trained, and what is not.
    """
    reducing: deque[Bucket] = deque()
    buckets: list[Bucket] = []
    frozen: list[FlatParameters] = []
    for portion in portions_of(chunks, whole_chunks=level < 3):
        trained = [(p, uses) for p, uses in portion if spec_of(p).trainable]
        for kind, group in group_parameters(trained, mesh, bucket_elements, matrices_apart, narrow):
            make = partial(NarrowBucket, gemms=narrow) if kind.narrow else Bucket
            buckets.append(make(kind, group, mesh, level=level, dtype=dtype, reduce_dtype=reduce_dtype,
                                reproducible=reproducible, reducing=reducing, rounding=rounding))
        if rest := [(p, uses) for p, uses in portion if not spec_of(p).trainable]:
            frozen.append(FlatParameters(rest, mesh, 3 if level == 3 else 0, dtype))
    return buckets, frozen


def portions_of(chunks: Sequence[Transformer], whole_chunks: bool) -> Iterator[Group]:
    """The parameters in backward order, by chunk or by unit, each where it is met first."""
    uses = count_uses(chunks)
    seen: set[nn.Parameter] = set()
    for chunk in chunks:
        portions = [[p for module in unit for p in module.parameters()] for unit in units_of(chunk)]
        if whole_chunks:
            portions = [[p for portion in portions for p in portion]]
        for portion in reversed(portions):
            yield [(p, uses[p]) for p in dict.fromkeys(reversed(portion)) if p not in seen]
            seen.update(portion)


def group_parameters(parameters: Iterable[tuple[nn.Parameter, int]], mesh: Mesh,
                     bucket_elements: int, matrices_apart: bool = False,
                     narrow: Collection[nn.Parameter] = ()) -> Iterator[tuple[BucketKind, Group]]:
    """Parameters in order → groups of one kind and limited size; a group is yielded when it is full, or at the end."""
    filling: dict[BucketKind, Group] = {}
    for parameter, uses in parameters:
        kind = kind_of(spec_of(parameter), mesh, uses, matrices_apart, parameter in narrow)
        group = filling.setdefault(kind, [])
        if group and sum(p.numel() for p, _ in group) + parameter.numel() > bucket_elements:
            yield kind, group
            group = filling[kind] = []
        group.append((parameter, uses))
    yield from filling.items()


def count_uses(chunks: Sequence[nn.Module]) -> dict[nn.Parameter, int]:
    """How many layers of these chunks hold each parameter: two for a tied embedding whose both ends are here."""
    uses: dict[nn.Parameter, int] = {}
    for chunk in chunks:
        for _, parameter in chunk.named_parameters(remove_duplicate=False):
            uses[parameter] = uses.get(parameter, 0) + 1
    return uses
