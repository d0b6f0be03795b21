"""Feed-forward layers: one or two projections into F features, an activation, one projection back.

    swiglu   down(silu(gate·x) · up·x)     Shazeer 2020
    gelu     down(gelu(up·x))              Hendrycks and Gimpel 2016, with the exact normal distribution
    relu2    down(relu(up·x)²)             So et al. 2021 (Primer)

The projections into the features are one matrix [inputs, F, H], so that a tensor rank's features are a plain box of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.kernels.table import Operations
from engine.model.context import Batch
from engine.model.half import INIT_STD, Angles, Half, Kept, residual_init_std
from engine.model.layers import Linear
from engine.model.spec import Rule

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
    inputs: ClassVar[int]

    def __init__(self, config: ModelConfig, index: int, name: str, operations: Operations) -> None:
        super().__init__(config, index, name, operations)
        self.linear_fc1 = Linear.create(f"{name}.linear_fc1", (self.inputs, config.ffn_hidden_size), config.hidden_size,
                                        Rule("column", 1), init_std=INIT_STD, bias=config.mlp_bias)
        self.activation = Activation(self.inputs, self.activate(operations))
        self.linear_fc2 = Linear.create(f"{name}.linear_fc2", (config.hidden_size,), config.ffn_hidden_size,
                                        Rule("row", 1), init_std=residual_init_std(config), bias=config.mlp_bias)

    def forward(self, x_SBH: Tensor, angles: Angles, batch: Batch) -> Tensor:
        return self.linear_fc2(self.activation(self.linear_fc1(x_SBH)))

    @staticmethod
    def activate(operations: Operations) -> Activate:
        """The function; it must keep no more for its backward pass than its input."""
        raise NotImplementedError

    @classmethod
    def kept(cls, config: ModelConfig) -> Kept:
        """The activation's input and its output, of which the latter is cheap."""
        return Kept((cls.inputs + 1) * config.ffn_hidden_size, cheap=config.ffn_hidden_size)


class SwiGLU(FeedForward):
    inputs = 2

    @staticmethod
    def activate(operations: Operations) -> Activate:
        return operations.swiglu


class GELU(FeedForward):
    inputs = 1

    @staticmethod
    def activate(operations: Operations) -> Activate:
        return F.gelu


class SquaredReLU(FeedForward):
    inputs = 1

    @staticmethod
    def activate(operations: Operations) -> Activate:
        return operations.relu2
