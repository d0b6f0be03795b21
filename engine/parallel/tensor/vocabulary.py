"""The output layer and what is made of its logits, some tokens at a time: the logits exist nowhere as a whole.

Llama 3's 128,256 columns of 8,192 tokens are 2 GB in bf16, and a softmax of them 4 GB.  What follows them is a number
or two per token; so a chunk of tokens goes all the way, and its logits make room for those of the next.  Backward needs
them again, and there are two ways to have them.  With T tokens, H features, V columns a product is 2·T·H·V operations:

    asked for anything        one product forward, three backward: the logits are computed again, chunk by chunk, but
                              for the last chunk's, which were kept.  A third more than without chunks.
    a weighted sum of losses  is linear in them.  Its gradient is known before it is: weight by weight, a chunk's logits
                              become their gradient and that goes into x's and W's before the next chunk: three products
                              in all, forward, and nothing but x's gradient is kept for the backward pass.

Pretraining and fine-tuning ask for the second: for Llama-3.2-1B at 8,192 tokens that saves 4.3 of 80 TFLOP, and 2 GB of
reading and writing logits.  Whether logits of *all* tokens had better be kept is no question of speed then.

The weight's gradient is summed up in fp32, chunk after chunk, where gradients are (`engine.parallel.gradients`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.distributed.collectives import Work
from engine.model.chunks import rows_of_chunk
from engine.parallel.gradients import slot_of
from engine.parallel.tensor.layers import ParallelLinear, full_sequence, start_full_sequence, start_sum_over_ranks

# Logits [tokens, columns] and labels [tokens] → numbers per token, [tokens] each.
PerToken = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def per_token(x: Tensor, layer: ParallelLinear, *, labels: Tensor, compute: PerToken) -> tuple[Tensor, ...]:
    """What `compute` makes of the logits of x [S' or S, B, H], each shaped like `labels` [S, B]; differentiable."""
    return _PerToken.apply(x, layer.weight, labels, layer, compute, torch.is_grad_enabled())


def weighted_sum(x: Tensor, layer: ParallelLinear, *, labels: Tensor, weights: Tensor | None, scale: Tensor,
                 compute: PerToken) -> tuple[Tensor, Tensor]:
    """Σ weight · the first of what `compute` makes, to be differentiated with `scale` as its gradient.

    Returns:
        The sum, a scalar, and the last of what `compute` makes, shaped like `labels`, not differentiable.
    """
    return _WeightedSum.apply(x, layer.weight, labels, weights, scale, layer, compute)


class _Chunks:
    """The tokens of a microbatch and a layer's products with them."""

    def __init__(self, x: Tensor, weight: Tensor, labels: Tensor, layer: ParallelLinear) -> None:
        """`x`: of the whole sequence."""
        self.x, self.matrix, self.labels = x.flatten(0, -2), weight.flatten(0, -2), labels.flatten()
        self.layer, self.shape = layer, x.shape
        rows = rows_of_chunk(len(self.x), len(self.matrix))
        self.slices = [slice(start, start + rows) for start in range(0, len(self.x), rows)]

    def results(self, rows: slice, compute: PerToken, differentiate: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The logits of some tokens, a leaf where something is to be differentiated, and what is made of them."""
        logits = self.layer.gemms.forward(self.x[rows], self.matrix, None).requires_grad_(differentiate)
        with torch.set_grad_enabled(differentiate):
            return logits, compute(logits, self.labels[rows])

    def backward(self, gradients: Iterator[tuple[slice, Tensor]], wanted: bool) -> tuple[Tensor, Tensor | None]:
        """x's gradient, this rank's part of the sum, and the weight's if it has no slot.

        Args:
            gradients: tokens and the gradient of their logits, chunk after chunk.
            wanted: the weight is trained.
        """
        out = [torch.empty_like(self.x)] if len(self.slices) > 1 else []
        summing: list[tuple[Tensor, Work]] = []

        def write(view: Tensor | None, accumulate: bool) -> None:
            left = len(self.slices)                       # no `enumerate`: it would hold one more gradient
            for rows, gradient in gradients:
                left -= 1
                part = self.layer.gemms.input_gradient(gradient, self.matrix)
                out[0][rows].copy_(part) if len(self.slices) > 1 else out.append(part)
                if not left:                              # it travels under the last product
                    summing.append(start_sum_over_ranks(out.pop().view(self.shape), self.layer.context))
                if view is not None:
                    self.layer.gemms.weight_gradient(view.flatten(0, -2), gradient, self.x[rows], accumulate=accumulate)
                accumulate = True
                del part, gradient                        # before the next chunk's logits are made

        slot, grad_weight = slot_of(self.layer.weight), None
        if not wanted:
            write(None, False)
        elif slot is not None:
            slot.contribute(write)
        else:
            grad_weight = torch.empty(self.matrix.shape, device=self.x.device,
                                      dtype=torch.promote_types(self.matrix.dtype, torch.float32))
            write(grad_weight, False)
            grad_weight = grad_weight.view(self.layer.weight.shape).to(self.matrix.dtype)
        [(grad_x, work)] = summing
        work.wait()
        return grad_x, grad_weight


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, layer: ParallelLinear, compute: PerToken,
                training: bool) -> tuple[Tensor, ...]:
        chunks = _Chunks(full_sequence(x, layer.context), weight, labels, layer)
        found = []
        for rows in chunks.slices:
            kept = None                                   # no two chunks' logits at once
            kept = chunks.results(rows, compute, training and rows is chunks.slices[-1])
            found.append([value.detach() for value in kept[1]])
        ctx.save_for_backward(x, weight, labels)
        ctx.layer, ctx.compute, ctx.kept = layer, compute, kept if training else None
        ctx.set_materialize_grads(False)
        return tuple(_joined(each).view(labels.shape) for each in zip(*found, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, labels = ctx.saved_tensors
        x, gathering = start_full_sequence(x, ctx.layer.context)
        gathering.wait()
        chunks = _Chunks(x, weight, labels, ctx.layer)
        flat = [None if grad is None else grad.flatten() for grad in grads]

        def gradients() -> Iterator[tuple[slice, Tensor]]:
            for rows in reversed(chunks.slices):
                logits, values = ctx.kept or chunks.results(rows, ctx.compute, True)
                ctx.kept = None
                pairs = [(value, grad[rows]) for value, grad in zip(values, flat, strict=True) if grad is not None]
                gradient = torch.autograd.grad([value for value, _ in pairs], logits, [grad for _, grad in pairs])
                del logits, values, pairs
                yield rows, gradient[0]
                del gradient

        grad_x, grad_weight = chunks.backward(gradients(), ctx.needs_input_grad[1])
        return grad_x, grad_weight, None, None, None, None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None, scale: Tensor,
                layer: ParallelLinear, compute: PerToken) -> tuple[Tensor, Tensor]:
        chunks = _Chunks(full_sequence(x, layer.context), weight, labels, layer)
        terms: list[Tensor] = []
        found: list[Tensor] = []
        upstream = scale.expand(labels.numel()) if weights is None else scale * weights.flatten()

        def gradients() -> Iterator[tuple[slice, Tensor]]:
            for rows in chunks.slices:
                logits, (value, *others) = chunks.results(rows, compute, True)
                terms.append(value.detach())
                found.append(others[-1].detach() if others else terms[-1])
                gradient = torch.autograd.grad(value, logits, upstream[rows].to(value.dtype))
                del logits, value, others
                yield rows, gradient[0]
                del gradient

        grad_x, ctx.grad_weight = chunks.backward(gradients(), ctx.needs_input_grad[1])
        summed, last = _joined(terms), _joined(found).view(labels.shape)
        ctx.save_for_backward(grad_x)
        ctx.scale = scale
        ctx.mark_non_differentiable(last)
        return (summed if weights is None else summed.mul(weights.flatten())).sum(), last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if grads[0] is not ctx.scale:
            raise RuntimeError("an objective's weighted sum of losses must itself be the sum that is differentiated, "
                               "because its gradients have been computed with it: else, take token_losses")
        [grad_x] = ctx.saved_tensors
        return grad_x, ctx.grad_weight, None, None, None, None, None
