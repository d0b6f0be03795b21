"""The end of the last chunk, cut over the tensor axis, with the sequence spread over the context axis.

What an objective gets to see (`engine.model.objective.Head`).  The logits stay spread over the vocabulary: ranks
exchange two or three numbers per token.  And they are there for some tokens at a time only (`vocabulary`).  Everything
that is returned is the same on all tensor ranks and covers this context rank's tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.distributed.boxes import Box
from engine.distributed.collectives import all_gather, my_part
from engine.distributed.mesh import Axis
from engine.model.parameters import spec_of
from engine.model.transformer import Transformer
from engine.parallel.tensor.layers import SumOverRanks, TensorContext
from engine.parallel.tensor.vocabulary import PerToken, per_token, weighted_sum


class ParallelHead:
    """See `engine.model.objective.Head`."""

    def __init__(self, chunk: Transformer, tensor: TensorContext, context: Axis, *, ahead: bool = True) -> None:
        """`ahead`: gradients of a weighted sum may be computed together with it, in the forward pass."""
        self._chunk, self._tensor, self._context, self._ahead = chunk, tensor, context, ahead
        self._columns = {} if chunk.output_layer is None else self._own_columns(spec_of(chunk.output_layer.weight).box)
        self.scale: Tensor | None = None

    def weighted_losses(self, x_SBH: Tensor, labels_SB: Tensor, weights_SB: Tensor | None,
                        z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
        compute = partial(self._losses, z_loss=z_loss)
        if self.scale is not None and self._ahead and not self._adapted:
            ahead = partial(weighted_sum, labels=labels_SB, weights=weights_SB, scale=self.scale,
                            compute=self._capped(compute))
            total, losses = self._chunk.through_output_layer(x_SBH, ahead)
            return total, losses
        summed, losses = self._per_token(x_SBH, labels_SB, compute)
        return (summed if weights_SB is None else summed.mul(weights_SB)).sum(), losses.detach()

    def token_losses(self, x_SBH: Tensor, labels_SB: Tensor) -> Tensor:
        return self._per_token(x_SBH, labels_SB, self._losses)[0]

    def token_log_probs_and_entropy(self, x_SBH: Tensor, labels_SB: Tensor, temperature: float = 1.0,
                                    num_ids: int | None = None) -> tuple[Tensor, Tensor]:
        columns = dict(self._columns)
        if num_ids is not None:                                    # columns from there on are padding, too
            columns["num_valid"] = min(max(num_ids - columns["first"], 0), columns["num_valid"])

        def compute(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            return self._tensor.operations.log_probs(logits, labels, temperature=temperature, **columns)

        log_probs, entropy = self._per_token(x_SBH, labels_SB, compute)
        return log_probs, entropy

    @property
    def _adapted(self) -> bool:
        """Something is added to the logits, and has gradients of its own: they must be there as a whole."""
        return self._chunk.output_layer is not None and self._chunk.output_layer.adapter is not None

    def _per_token(self, x_SBH: Tensor, labels_SB: Tensor, compute: PerToken) -> tuple[Tensor, ...]:
        if self._adapted:
            return compute(self._chunk.logits(x_SBH), labels_SB)
        found: tuple[Tensor, ...] = self._chunk.through_output_layer(x_SBH, partial(per_token, labels=labels_SB,
                                                                                   compute=self._capped(compute)))
        return found

    def _capped(self, compute: PerToken) -> PerToken:
        """Of logits as the output layer gives them."""
        return lambda logits, labels: compute(self._chunk.capped(logits), labels)

    def _losses(self, logits: Tensor, labels: Tensor, z_loss: float = 0.0) -> tuple[Tensor, ...]:
        """What is summed up of each token, and its loss."""
        losses, log_z = self._tensor.operations.cross_entropy(logits, labels, **self._columns)
        return (losses + z_loss * log_z.square() if z_loss else losses), losses

    def scores(self, x_SBH: Tensor) -> Tensor:
        scores = self._chunk.scores(x_SBH)
        joined: Tensor = _JoinSequence.apply(scores, self._tensor.axis) if self._tensor.sequence else scores
        return joined

    def sum_over_sequence(self, x: Tensor) -> Tensor:
        if self._context.size == 1:
            return x
        total: Tensor = SumOverRanks.apply(x, self._context)
        return total

    def once(self, x: Tensor) -> Tensor:
        return x if self._context.index == 0 else x * 0.0          # stays in the graph: gradients meet on their way

    def _own_columns(self, box: Box) -> dict[str, Any]:
        """Which part of the vocabulary is here, and how to hear from those who have the others."""
        return {"first": box.offset[0], "num_valid": box.size[0],
                "gather": self._gather if self._tensor.axis.size > 1 else None}

    def _gather(self, parts: Tensor) -> Tensor:
        return all_gather(parts.unsqueeze(0), self._tensor.axis)


class _JoinSequence(torch.autograd.Function):
    """This rank's part of the sequence → all of it, which every rank goes on with alike."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return my_part(grads[0], ctx.axis).contiguous(), None
