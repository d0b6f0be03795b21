"""Feed-forward layers: one or two projections into F features, an activation, one projection back.

    swiglu   down(silu(gate·x) · up·x)     Shazeer 2020
    gelu     down(gelu(up·x))              Hendrycks and Gimpel 2016, with the exact normal distribution
    relu2    down(relu(up·x)²)             So et al. 2021 (Primer)
    gelu-tanh, relu, geglu                 GPT-2's approximation, Vaswani et al. 2017; gelu-tanh(gate·x) · up·x (Gemma)

The projections into the features are one matrix [inputs, F, H], so that a tensor rank's features are a plain box of it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.kernels.table import Operations
from engine.model.context import Batch
from engine.model.half import Angles, Half
from engine.model.inventory import Specs
from engine.model.layers import Linear

Activate = Callable[[Tensor], Tensor]


class Activation(nn.Module):
    """[S, B, inputs · F] → [S, B, F], by a function of [S, B, inputs, F], or of [S, B, F] for one input."""

    def __init__(self, inputs: int, activate: Activate) -> None:
        super().__init__()
        self.inputs, self._activate = inputs, activate

    def forward(self, x: Tensor) -> Tensor:
        return self._activate(x if self.inputs == 1 else x.unflatten(-1, (self.inputs, -1)))


class FeedForward(Half):
    """The part that all kinds share; a kind is a number of inputs and a function."""

    entrance = "linear_fc1"
    cheap = (("activation", "linear_fc2"),)

    def __init__(self, config: ModelConfig, index: int, specs: Specs, operations: Operations) -> None:
        super().__init__(config, index, specs, operations)
        self.linear_fc1, self.linear_fc2 = Linear.of(specs, "linear_fc1"), Linear.of(specs, "linear_fc2")
        self.activation = Activation(specs["linear_fc1.weight"].shape[0], self.activate(operations))

    def forward(self, x_SBH: Tensor, angles: Angles, batch: Batch) -> Tensor:
        return self.linear_fc2(self.activation(self.linear_fc1(x_SBH)))

    @staticmethod
    @abstractmethod
    def activate(operations: Operations) -> Activate:
        """The function; it must keep no more for its backward pass than its input."""


class SwiGLU(FeedForward):
    @staticmethod
    def activate(operations: Operations) -> Activate:
        return operations.swiglu


class GELU(FeedForward):
    @staticmethod
    def activate(operations: Operations) -> Activate:
        return F.gelu


class SquaredReLU(FeedForward):
    @staticmethod
    def activate(operations: Operations) -> Activate:
        return operations.relu2


class GELUTanh(FeedForward):
    @staticmethod
    def activate(operations: Operations) -> Activate:
        return gelu_tanh


class ReLU(FeedForward):
    @staticmethod
    def activate(operations: Operations) -> Activate:
        return lambda x: _KeepingInput.apply(x, F.relu)


class GEGLU(FeedForward):
    @staticmethod
    def activate(operations: Operations) -> Activate:
        return lambda x: _KeepingInput.apply(x, _geglu)


def gelu_tanh(x: Tensor) -> Tensor:
    """x·Φ(x) with Hendrycks and Gimpel's tanh for Φ (2016, section 2)."""
    return F.gelu(x, approximate="tanh")


def _geglu(x: Tensor) -> Tensor:
    gate, up = x.unbind(-2)
    return gelu_tanh(gate) * up


class _KeepingInput(torch.autograd.Function):
    """A function that keeps its input only, and is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Activate) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function = function
        return function(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            [grad] = torch.autograd.grad(ctx.function(leaf), leaf, grads[0])
        return grad, None
