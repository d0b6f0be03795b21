"""Squared ReLU (So et al. 2021): relu(x)², keeping only x for the backward pass, 2·relu(x)·dy."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from engine.kernels.operation import Implementation, Operation, anywhere


def relu2_reference(x: Tensor) -> Tensor:
    """Plain torch."""
    return F.relu(x).square()


class _SquaredReLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.relu(x).square_()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return F.relu(x).mul_(2).mul_(grads[0])


def relu2(x: Tensor) -> Tensor:
    """Elementwise, of any shape."""
    return _SquaredReLU.apply(x)


RELU2 = Operation("relu2", "activation of the feed-forward layer", (
    Implementation("octant", anywhere(relu2)),
    Implementation("reference", anywhere(relu2_reference))))
