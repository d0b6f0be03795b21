"""The plain building blocks: linear layer, embedding, norm.

They hold whole tensors and communicate nothing.  `engine.parallel.tensor` swaps the linear layers and the embedding for
subclasses that hold a slice; the blocks above see the same interface.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pkgutil import resolve_name
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.kernels.table import Operations
from engine.model.inventory import Specs
from engine.model.kinds import norm_of
from engine.model.parameters import new_parameter, spec_of


class Adds(Protocol):
    """What may be added to a linear layer: see `engine.model.adapter`."""

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """The layer's output, given that and its input."""
        ...


class Linear(nn.Module):
    """y = x·Wᵀ + b, the weight kept in a shape whose slices are boxes: [*out, in], viewed as [prod(out), in].

    Attributes:
        adapter: a module that adds to y; None: nothing does.
    """

    adapter: Adds | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.adapter = None

    @staticmethod
    def of(specs: Specs, name: str) -> Linear:
        """A layer with parameters of its own: `name.weight` and, where there is one, `name.bias`."""
        bias = specs.get(f"{name}.bias")
        return Linear(new_parameter(specs[f"{name}.weight"]), None if bias is None else new_parameter(bias))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., prod(out)]."""
        y = F.linear(x, self.weight.flatten(0, -2), None if self.bias is None else self.bias.flatten())
        return y if self.adapter is None else self.adapter.add_to(y, x)


class Embedding(nn.Module):
    """Token ids [S, B] → hidden states [S, B, H]."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, tokens_SB: Tensor) -> Tensor:
        return F.embedding(tokens_SB, self.weight)


class PositionEmbedding(nn.Module):
    """Positions [S, B or 1] → what is added to the embeddings there, [S, B or 1, H]: a row of a table for each."""

    def __init__(self, weight: nn.Parameter, offset: int) -> None:
        super().__init__()
        self.weight, self.offset = weight, offset

    def forward(self, positions_SB: Tensor) -> Tensor:
        return F.embedding(positions_SB + self.offset, _Widen.apply(self.weight)).to(self.weight.dtype)


class Norm(nn.Module, ABC):
    """A norm over the last dimension, of one of the kinds in `engine.model.kinds`."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, eps: float, operations: Operations) -> None:
        super().__init__()
        self.eps, self.operations = eps, operations
        self.weight, self.bias = weight, bias

    @staticmethod
    def of(config: ModelConfig, specs: Specs, name: str, operations: Operations) -> Norm:
        """A norm of the model's kind with parameters of its own: `name.weight` and, where there is one, `name.bias`."""
        bias = specs.get(f"{name}.bias")
        made: Norm = resolve_name(norm_of(config).computes)(
            new_parameter(specs[f"{name}.weight"]), None if bias is None else new_parameter(bias), config.norm_eps,
            operations)
        return made

    @abstractmethod
    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The sum of both, or `x`, to go on with along the residual stream; and its norm."""


class RMSNorm(Norm):
    """See `kernels/rms_norm.py`."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.operations.rms_norm(x, residual, self.weight, self.eps)


class ShiftedRMSNorm(Norm):
    """An RMSNorm whose weight is stored less one, so that decay would pull it towards one (Gemma)."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weight: Tensor = _Widen.apply(self.weight)
        return self.operations.rms_norm(x, residual, weight + 1, self.eps)


class LayerNorm(Norm):
    """See `kernels/layer_norm.py`."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        return total, self.operations.layer_norm(total, self.weight, self.bias, self.eps)


class ProjectionNorm(Norm):
    """An RMSNorm of a token's heads together, of which there may be more elsewhere: [..., G, rows, D]."""

    @staticmethod
    def of(config: ModelConfig, specs: Specs, name: str, operations: Operations) -> ProjectionNorm:
        return ProjectionNorm(new_parameter(specs[f"{name}.weight"]), None, config.norm_eps, operations)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weight: Tensor = _Widen.apply(self.weight)
        wide = x.to(weight.dtype)
        mean = self.total(wide.square().sum((-3, -2, -1), keepdim=True)) / spec_of(self.weight).num_elements
        return x, (wide * (mean + self.eps).rsqrt() * weight).to(x.dtype)

    def total(self, sums: Tensor) -> Tensor:
        """Sums over the heads that are here → over all."""
        return sums


class ScoreHead(nn.Module):
    """A number per token: w·x in fp32 (reward models, critics)."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] → fp32 [...]."""
        weight: Tensor = _Widen.apply(self.weight)
        return F.linear(x.to(weight.dtype), weight).squeeze(-1)


class _Widen(torch.autograd.Function):
    """A parameter in fp32 (fp64 if that is what it is), whose gradient is not rounded to the parameter's own dtype."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.to(torch.promote_types(parameter.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]
