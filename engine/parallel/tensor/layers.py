"""Column-, row- and vocabulary-parallel layers (Shoeybi et al. 2019; sequence parallelism: Korthikanti et al. 2022).

A linear layer y = x·Wᵀ is cut over T ranks along its output features (column-parallel) or its input features
(row-parallel).  A column-parallel layer followed by a row-parallel one needs one collective at each end:

    without sequence parallelism                         with it (activations between blocks are [S/T, B, H])
    column:  x                → y_t                      column:  all-gather x along S   → y_t
    row:     x_t → partial y  → all-reduce               row:     x_t → partial y        → reduce-scatter along S

and the conjugates backward.  Both are one autograd function here, because its backward pass hides communication: the
collective on the input gradient runs while the weight gradient's product is computed, and under sequence parallelism
the input is gathered a second time, under the input gradient's product, rather than kept.

On one rank the same code runs with every collective skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.distributed.collectives import (
    DONE,
    Work,
    all_gather,
    all_reduce,
    reduce_scatter,
    start_all_gather,
    start_reduce_scatter,
)
from engine.distributed.mesh import Axis
from engine.kernels.fp8 import Scaled
from engine.kernels.operation import applied
from engine.kernels.table import Operations
from engine.model.layers import Adds, PositionEmbedding, ProjectionNorm
from engine.model.parameters import spec_of
from engine.parallel.gradients import WeightGradQueue, slot_of
from engine.precision.gemms import Gemms, GemmsFactory, Operand


@dataclass(frozen=True)
class TensorContext:
    """What a cut layer needs to know about its peers, and what it computes with.

    Attributes:
        embedding_grad: share of its gradient that the embedding gets.
    """

    axis: Axis
    sequence: bool
    weight_grads: WeightGradQueue
    operations: Operations
    gemms: GemmsFactory
    embedding_grad: float = 1.0


def sum_over_ranks(x: Tensor, context: TensorContext) -> Tensor:
    """Partial sums → sums: scattered along the sequence with sequence parallelism, else everywhere."""
    if context.sequence:
        return reduce_scatter(x, context.axis)
    all_reduce(x, context.axis)
    return x


def start_sum_over_ranks(x: Tensor, context: TensorContext) -> tuple[Tensor, Work]:
    """As `sum_over_ranks`, not waiting."""
    if context.sequence:
        return start_reduce_scatter(x, context.axis)
    return x, all_reduce(x, context.axis, asynchronous=True)


def start_full_sequence(x: Tensor, context: TensorContext) -> tuple[Tensor, Work]:
    """This rank's part of the sequence → all of it; nothing to do without sequence parallelism."""
    return start_all_gather(x, context.axis) if context.sequence else (x, DONE)


def full_sequence(x: Tensor, context: TensorContext) -> Tensor:
    """As `start_full_sequence`, waiting."""
    return all_gather(x, context.axis) if context.sequence else x


def start_full_operand(x: Operand, context: TensorContext) -> tuple[Operand, Work]:
    """As `start_full_sequence`, of what stands for this rank's part of the sequence in a product."""
    if isinstance(x, Tensor) or not context.sequence:
        return start_full_sequence(x, context) if isinstance(x, Tensor) else (x, DONE)
    values, work = start_all_gather(x.values.view(torch.uint8), context.axis)      # no backend knows FP8
    scales = x.scales if x.block[0] is None else all_gather(x.scales, context.axis)
    return Scaled(values.view(x.values.dtype), scales, x.block), work


def full_operand(x: Operand, context: TensorContext) -> Operand:
    """As `start_full_operand`, waiting."""
    full, work = start_full_operand(x, context)
    work.wait()
    return full


class _Linear(torch.autograd.Function):
    """x [S', B, in] → y [S'', B, out]; which of the two sequence lengths is the short one depends on `kind`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: ParallelLinear) -> Tensor:
        operand = layer.gemms.operand(x)
        ctx.save_for_backward(x, weight, operand.scales if isinstance(operand, Scaled) else None)
        ctx.layer, ctx.bias_shape = layer, None if bias is None else bias.shape
        matrix, context = weight.flatten(0, -2), layer.context
        if layer.kind == "column":
            operand = full_operand(operand, context)
            out = layer.gemms.forward(operand, matrix, None if bias is None else bias.flatten())
            # With a bias torch's product is a view, and to one that leaves here an adapter may not add in place.
            return out if bias is None or layer.adapter is None else out.clone()
        out = sum_over_ranks(layer.gemms.forward(operand, matrix, None), context)
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        layer: ParallelLinear = ctx.layer
        matrix, context, gemms = weight.flatten(0, -2), layer.context, layer.gemms
        trained = ctx.needs_input_grad[1]
        x_full, gathering = (gemms.operand(x, scales=scales) if trained else x), DONE
        grad_out = gemms.operand(grads[0], gradient=True)
        if layer.kind == "column":
            if trained:
                x_full, gathering = start_full_operand(x_full, context)
            grad_x, summing = start_sum_over_ranks(gemms.input_gradient(grad_out, matrix), context)
        else:
            grad_out = full_operand(grad_out, context)
            grad_x, summing = gemms.input_gradient(grad_out, matrix), DONE
        grad_bias = None
        if ctx.bias_shape is not None and ctx.needs_input_grad[2]:
            grad_bias = sum_over_tokens(grads[0]).view(ctx.bias_shape)
        grad_weight = None
        if trained:
            gathering.wait()
            grad_weight = _weight_grad(layer, grad_out, x_full)
        summing.wait()
        return grad_x, grad_weight, grad_bias, None


def _weight_grad(layer: ParallelLinear, grad_out: Operand, x: Operand) -> Tensor | None:
    """dW = dyᵀ·x, into the parameter's slot (now or at the `W` action), or returned to autograd if it has none.

    The layer is asked for its parameter: what autograd saved of it may be another tensor, when layers are recomputed.
    """
    def write(out: Tensor, accumulate: bool) -> None:
        layer.gemms.weight_gradient(out.flatten(0, -2), grad_out, x, accumulate=accumulate)

    slot = slot_of(layer.weight)
    if slot is None:
        grad = torch.empty_like(layer.weight)
        write(grad, False)
        return grad
    layer.context.weight_grads.submit(lambda: slot.contribute(write))
    return None


def sum_over_tokens(x: Tensor) -> Tensor:
    """[..., n] → [n], in fp32 (fp64 where that came in): autograd casts it to what the parameter takes."""
    return x.flatten(0, -2).sum(0, dtype=torch.promote_types(x.dtype, torch.float32))


class ParallelLinear(nn.Module):
    """A linear layer that holds a slice of its features; see the module docstring for `kind`."""

    adapter: Adds | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, kind: Literal["column", "row"],
                 context: TensorContext) -> None:
        super().__init__()
        self.weight, self.bias, self.kind, self.context = weight, bias, kind, context
        self.gemms: Gemms = context.gemms(spec_of(weight))
        self.adapter = None

    def forward(self, x: Tensor, instead: Callable[[Tensor, ParallelLinear], Any] | None = None) -> Any:
        """[S or S/T, B, in] → [S or S/T, B, out].

        `instead`: what to do with the input where the output is too large to exist, and returned then.
        """
        if instead is not None:
            return instead(x, self)
        y: Tensor = applied(_Linear, x, self.weight, self.bias, self)
        return y if self.adapter is None else self.adapter.add_to(y, x)


class _VocabEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, layer: VocabEmbedding) -> Tensor:
        rows, mine, ctx.context = tokens, None, layer.context
        if layer.context.axis.size > 1:
            local = tokens - layer.first
            mine = (local >= 0) & (local < layer.num_rows)
            rows = torch.where(mine, local, 0)
        ctx.save_for_backward(rows, mine, weight)
        out = F.embedding(rows, weight)
        return out if mine is None else sum_over_ranks(out.masked_fill_(~mine.unsqueeze(-1), 0.0), layer.context)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, mine, weight = ctx.saved_tensors
        grad = full_sequence(grads[0], ctx.context)
        if mine is not None:
            grad = grad.masked_fill(~mine.unsqueeze(-1), 0.0)
        if ctx.context.embedding_grad != 1:
            grad = grad * ctx.context.embedding_grad
        index, values = rows.flatten(), grad.flatten(0, -2)
        slot = slot_of(weight)
        if slot is None:
            return None, torch.zeros_like(weight).index_add_(0, index, values.to(weight.dtype)), None
        slot.add_rows(index, values)
        return None, None, None


class VocabEmbedding(nn.Module):
    """Embedding whose rows are spread over the tensor axis: a rank looks up its own, and the sum has them all.

    Its weight gets a share of the gradient, as of e·α + stop_gradient(e)·(1 − α) (Zeng et al. 2022, section 2.2).
    """

    def __init__(self, weight: nn.Parameter, context: TensorContext) -> None:
        super().__init__()
        self.weight, self.context = weight, context
        box = spec_of(weight).box
        self.first, self.num_rows = box.offset[0], box.size[0]

    def forward(self, tokens_SB: Tensor) -> Tensor:
        """[S, B] → [S, B, H], or [S/T, B, H] with sequence parallelism."""
        return applied(_VocabEmbedding, tokens_SB, self.weight, self)


class ParallelProjectionNorm(ProjectionNorm):
    """Of heads that tensor ranks divide; those that several have copies of count once."""

    def __init__(self, whole: ProjectionNorm, context: TensorContext) -> None:
        super().__init__(whole.weight, None, whole.eps, whole.operations)
        spec = spec_of(whole.weight)
        self._axis, self._copies = context.axis, spec.copies if spec.rule.copied else 1

    def total(self, sums: Tensor) -> Tensor:
        total: Tensor = SumOverRanks.apply(sums / self._copies, self._axis)
        return total


class SumOverRanks(torch.autograd.Function):
    """The sum on every rank.  What each makes of it may differ, so the gradient is a sum over them too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        total = x.clone(memory_format=torch.contiguous_format)
        all_reduce(total, axis)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        all_reduce(grad, ctx.axis)
        return grad, None


class PartPositionEmbedding(PositionEmbedding):
    """Of this rank's part of the sequence, where the tensor axis divides it."""

    def __init__(self, whole: PositionEmbedding, context: TensorContext) -> None:
        super().__init__(whole.weight, whole.offset)
        self._parts = context.axis.size if context.sequence else 1
        self._index = context.axis.index if context.sequence else 0

    def forward(self, positions_SB: Tensor) -> Tensor:
        return super().forward(positions_SB.chunk(self._parts)[self._index])
