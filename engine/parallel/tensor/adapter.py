"""Low-rank adapters cut over the tensor axis.

The large sides of A and B lie as those of the weight do; what crosses ranks is the small side between them, `rank`
numbers per token and projection:

    column    u = A·x of this rank's tokens,     gathered along the sequence,          y_t = B_t·u
    row       u_t = A_t·x_t, a partial sum,      summed, scattered along the sequence, y = B·u of this rank's tokens

Without sequence parallelism u is the same everywhere in the first case, and its gradient a sum over the ranks; in the
second it is the other way round.  Either way what is done backward is the conjugate of what is done forward.  The
products themselves are those of linear layers that have no peers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.distributed.collectives import my_part
from engine.distributed.mesh import Axis
from engine.model.adapter import Adapter, Projection
from engine.model.parameters import spec_of
from engine.model.projections import FUSED
from engine.parallel.tensor.layers import ParallelLinear, TensorContext, full_sequence, sum_over_ranks
from engine.precision.gemms import plain_gemms


class ParallelAdapter(Adapter):
    """This rank's part of an `Adapter`."""

    def __init__(self, adapter: Adapter, context: TensorContext) -> None:
        """Takes the parameters over, which are cut already."""
        nn.Module.__init__(self)
        self.dim, self.weight = adapter.dim, adapter.weight.on_tensor_rank(context.axis.size, context.axis.index,
                                                                           context.sequence)
        self.projections, self.size = adapter.projections, adapter.size
        if self.weight.copies > 1:                      # fewer queries in front of the key and the value
            self.size = self.weight.local_shape[self.dim]
            here = {row[0]: row for row in FUSED["linear_qkv"].rows(self.size)}
            self.projections = tuple(Projection(*here[each.name]) for each in adapter.projections)
        self.config, self.active = adapter.config, adapter.active
        self.key, self.noise = adapter.key, adapter.noise
        alone = replace(context, axis=Axis.single("tensor"), sequence=False, gemms=plain_gemms(context.operations))
        self.context, self.row = context, spec_of(adapter.a).rule.kind == "row"
        self.a_layer = ParallelLinear(adapter.a, None, "column", alone)
        self.b_layers = nn.ModuleDict({each.name: ParallelLinear(adapter.b(each), None, "column", alone)
                                       for each in adapter.projections})

    def b(self, projection: Projection) -> nn.Parameter:
        layer = self.b_layers[projection.name]
        assert isinstance(layer, ParallelLinear)
        return layer.weight

    def of_tokens(self, keys_SB: Tensor) -> Tensor:
        return my_part(keys_SB, self.context.axis) if self.context.sequence and not self.row else keys_SB

    def first_feature(self, x: Tensor) -> int:
        return self.context.axis.index * x.shape[-1] if self.row else 0

    def inner(self, x: Tensor) -> Tensor:
        inner: Tensor = (_Leave if self.row else _Enter).apply(self.a_layer(x), self.context)
        return inner

    def outer(self, projection: Projection, inner: Tensor) -> Tensor:
        out: Tensor = self.b_layers[projection.name](inner.contiguous())
        return out


class _Enter(torch.autograd.Function):
    """Into a region: all of the sequence, for every rank's own features; their gradients add up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, context: TensorContext) -> Tensor:
        ctx.context = context
        return full_sequence(x, context)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _summed(grads[0], ctx.context), None


class _Leave(torch.autograd.Function):
    """Out of a region: partial sums add up, to this rank's part of the sequence."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, context: TensorContext) -> Tensor:
        ctx.context = context
        return _summed(x, context)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return full_sequence(grads[0].contiguous(), ctx.context), None


def _summed(x: Tensor, context: TensorContext) -> Tensor:
    """A sum over the ranks; `x` may be somebody else's too."""
    return sum_over_ranks(x.clone(memory_format=torch.contiguous_format), context)
