"""Feed-forward layers: one or two projections into F features, an activation, one projection back.

    swiglu   down(silu(gate·x) · up·x)     Shazeer 2020
    gelu     down(gelu(up·x))              Hendrycks and Gimpel 2016, with the exact normal distribution
    relu2    down(relu(up·x)²)             So et al. 2021 (Primer)

The projections into the features are one matrix [inputs, F, H], so that a tensor rank's features are a plain box of it.
"""

from __future__ import annotations

from collections.abc import Callable

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
    def activate(operations: Operations) -> Activate:
        """The function; it must keep no more for its backward pass than its input."""
        raise NotImplementedError


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
